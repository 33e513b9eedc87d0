"""The proof of preference and reward training: whole rows that the model cuts itself, against one process.

The reference is TRL's in one process: its fused head or transformers' classifier, whole padded rows, transformers' own
attention. `dense`, `even` and `padded` are rows of pairs with a reference model of other weights; `lora` trains an
adapter on padded rows, and its reference is the model without it; `flattened` leaves the padding out.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from ..adapters.instance_forward import patches_on
from ..adapters.wrapped import unwrap
from ..config.run import LongContextConfig
from ..families import first_position
from ..parallel.mesh import SequenceMesh
from ..trainer.checks import check_model
from ..trainer.pooled_rows import pool_whole_rows
from ..trainer.scored_rows import score_whole_rows
from ..trainer.whole_rows import RowSharing
from ..trainer.whole_rows_checks import check_flattened, compare_whole_rows, prove_whole_rows
from .build import build_model
from .compare import Pair
from .numbers import Numbers, relative, wrap
from .outcomes import SENSITIVE, Outcome, attempt, least_of_ranks
from .random_rows import ROWS_OF_A_GROUP, Rows
from .result import UNBUILDABLE, tolerance
from .whole_rows_numbers import FIELDS, Side, of_one_process, on_the_ranks, outputs_of_the_last_share


LORA, FLATTENED = "lora", "flattened"
_ROWS = {LORA: "padded", FLATTENED: "padded"}


class WholeRowsPair(Pair):
    """Policy and reference, or a reward model, in one process and on all ranks.

    Raises:
        Outcome: one process cannot run it.
    """

    ours: dict[bool, Side]  # ... with an adapter

    def _unsharded_model(self) -> torch.nn.Module:
        super()._unsharded_model()
        self.sides = {False: self._side(None)}
        return self.sides[False].model

    def _prepare(self) -> None:
        self.mesh = SequenceMesh.build(self.setting.sequence_parallel_size)
        self.ours = {False: attempt(lambda: self._shared(False), attention="ulysses")}
        attempt(lambda: self._check_side(self.ours[False]))
        self.model = self.ours[False].model
        self.baseline = self._baseline_error()
        self.wrapped_sides = {False: wrap(self.model, self.setting.wrapper)}

    def prove(self, kind: str, rounded: Numbers | None = None):
        self.prepare()
        if kind == LORA and True not in self.ours:
            self.reference(kind)  # before anything of ours
            self.ours[True] = attempt(lambda: self._shared(True), attention="ulysses")
            attempt(lambda: self._check_side(self.ours[True]))
            self.wrapped_sides[True] = wrap(self.ours[True].model, self.setting.wrapper)
        if kind == FLATTENED:
            attempt(lambda: self._check_flattened(self.ours[False]))
        return super().prove(kind, rounded)

    def rows(self, kind: str, may_pad_left: bool = True) -> Rows:
        """Pairs: no padding predicts, nothing but padding has its token, and none that is refused is on the left."""
        rows = super().rows(_ROWS.get(kind, kind), may_pad_left and not self._reads_left_padding())
        if self.tested.task == "dpo":
            return dataclasses.replace(rows.without_padding_targets(), kind=kind)
        ids, pad = rows.batch["input_ids"], _pad_token(self.unsharded)
        ids = ids.masked_fill(ids == pad, (pad + 1) % self.vocabulary).masked_fill(~rows.valid, pad)
        return dataclasses.replace(rows, kind=kind, batch={**rows.batch, "input_ids": ids})

    def alone(self, kind: str) -> torch.nn.Module:
        return self._side_of(kind).model

    def of_one_process(self, kind: str) -> Numbers:
        return of_one_process(self._side_of(kind), self.tested.task, self.rows(kind))

    def on_the_ranks(self, kind: str) -> Numbers:
        has_adapter = kind == LORA
        side, wrapped = self.ours[has_adapter], self.wrapped_sides[has_adapter]
        sharing = self._sharing(kind == FLATTENED)
        return on_the_ranks(side, wrapped, self.tested.task, self.rows(kind), sharing, self.setting)

    def _full_attention(self, rows: Rows, theirs: Numbers) -> None:
        return None

    def _reads_left_padding(self) -> bool:
        models = self.ours[False].models if hasattr(self, "ours") else ()
        patches = [patch for model in models for patch in patches_on(unwrap(model))]
        return any(getattr(patch, "reads_left_padding", False) for patch in patches)

    def _sharing(self, flatten: bool = False) -> RowSharing:
        return RowSharing(self.mesh, self.setting.inner_attention, flatten)

    def _side_of(self, kind: str) -> Side:
        if kind == LORA and True not in self.sides:
            self.sides[True] = self._side(None, adapter=True)
        return self.sides[kind == LORA]

    def _shared(self, adapter: bool) -> Side:
        ours, theirs = self._side("ulysses", adapter), self.sides[adapter]
        for model, expected in zip(ours.models, theirs.models):
            model.load_state_dict(expected.state_dict())
        return ours

    def _side(self, attention: str | None, adapter: bool = False) -> Side:
        if self.tested.task == "reward":
            return Side(self._model(attention, adapter))
        if adapter:
            return Side(self._model(attention, adapter))
        return Side(self._model(attention), _moved(self._model(attention)))

    def _model(self, attention: str | None, adapter: bool = False) -> Any:
        dtype = getattr(torch, self.dtype)
        model: Any = build_model(self.tested, attention, dtype)
        if self.tested.task == "reward":
            model.config.get_text_config().pad_token_id = model.config.pad_token_id = _pad_token(model)
        if adapter:
            torch.manual_seed(0)
            kind = {"task_type": "SEQ_CLS"} if self.tested.task == "reward" else {}
            with warnings.catch_warnings():  # of PEFT about a choice of layers that is not the user's
                warnings.simplefilter("ignore")
                model = _with_adapter(model, **kind).to(dtype).train()
        if self.tested.task == "dpo":
            add_fused_lm_head(unwrap(model), outputs=FIELDS)
        return model

    def _check_side(self, side: Side) -> None:
        """What a trainer does before its first step, with every model."""
        setting = self.setting
        config = LongContextConfig(
            sequence_parallel_size=setting.sequence_parallel_size, inner_attention=setting.inner_attention
        )
        attach = score_whole_rows if self.tested.task == "dpo" else pool_whole_rows
        for model in side.models:
            check_model(model, config)
            prove_whole_rows(model, self._sharing(), attach)

    def _check_flattened(self, side: Side) -> None:
        for model in side.models:
            check_flattened(model)
            compare_whole_rows(model, self._sharing(flatten=True))

    def _baseline_error(self) -> float | None:
        size = self.setting.sequence_parallel_size
        if size == 1:
            return None
        rows, expected = self.rows("dense"), self.reference("dense").outputs
        num_tokens, group = rows.valid.shape[1], self.mesh.data_parallel_rank
        first = -(-num_tokens // size) * (size - 1)
        side, task, start = self.ours[False], self.tested.task, first_position(self.tested.config)
        outputs = attempt(lambda: outputs_of_the_last_share(side, task, rows, group, first, start))
        expected = expected[group * ROWS_OF_A_GROUP :][:ROWS_OF_A_GROUP, -outputs.shape[1] :, 0]
        error = least_of_ranks(relative(outputs, expected))
        if error < SENSITIVE * tolerance(self.num_tokens("dense")):
            raise Outcome(
                UNBUILDABLE,
                f"a rank that gets nothing from the others differs by {error:.1e} only, so no comparison of this "
                "model shows whether they exchange anything",
            )
        return error


def _with_adapter(model: Any, **kind: str) -> Any:
    """LoRA on every linear layer that PEFT has it for, and not from zeros, so that the adapter changes something."""
    options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False, **kind}
    try:
        return get_peft_model(model, LoraConfig(**options))
    except ValueError:  # of a module that a Mamba layer reads the weight of
        return get_peft_model(model, LoraConfig(**options, exclude_modules=r".*\.(out_proj|conv1d)"))


@torch.no_grad()
def _moved(model: torch.nn.Module) -> torch.nn.Module:
    """The same with other weights: a policy that has been trained is not its reference."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.mul_(1.0 + 0.1 * noise.to(parameter.dtype))
    return model.requires_grad_(False)


def _pad_token(model: torch.nn.Module) -> int:
    config: Any = unwrap(model).config
    pad = config.get_text_config().pad_token_id if hasattr(config.get_text_config(), "pad_token_id") else None
    return 0 if pad is None or pad < 0 else pad

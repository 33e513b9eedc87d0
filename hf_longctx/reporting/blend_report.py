"""`BlendReport`: what a run read of each source of its blend, and the loss of each, in the trainer's own logs.

How: rows of the blend carry a mark for each token, which is cut and packed with the tokens; the trainer takes it off
the batch and hands it over with the targets. The losses of single tokens come from the logits that the forward made,
or from the tiles of a tiled loss, so there is no second forward. Sums are added up over micro-batches, ranks and
steps, so the losses of all sources, weighted by their targets, are the loss of the run.
Price: one pass over the logits, a few thousand tokens at a time, and one all-reduce of four numbers a source and
optimizer step.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..adapters.instance_forward import patch_on
from ..adapters.tiled_loss import TILED_LOSS
from ..adapters.wrapped import unwrap
from ..data.blend.blended_rows import find_blend
from ..parallel.shard import IGNORE_INDEX


logger = logging.getLogger(__name__)

_TOKENS_AT_A_TIME = 2048
# What is counted for each source.
_TOKENS, _ROWS, _TARGETS, _LOSS = range(4)


class BlendReport(TrainerCallback, ExportableState):
    """Report what a run reads of each source of a [`BlendedRows`], and the loss of each source.

    Each training log gets, for every source,
    - `tokens/NAME`: its tokens that the run has read so far, padding left out;
    - `passes/NAME`: how often it was read so far, in passes over all of its rows;
    - `loss/NAME`: the mean cross entropy of its targets since the last log, in nats; left out where it had none, and,
      with a warning, where the forward gives no losses of single tokens.

    A checkpoint holds the sums, so a run that resumes goes on counting. [`RunReport`] puts them into the model card.

    Use [`BlendReport.attach`] rather than `callbacks=[...]`: rows must be marked, and loggers come before a user's.

    Communication: one all-reduce of four numbers a source and optimizer step; every rank must have the callback.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._sizes: list[int] = []
        self._step = self._since_log = self._so_far = torch.zeros(0, 4, dtype=torch.float64)
        self._expected: tuple[torch.Tensor, torch.Tensor] | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._warned = False

    def attach(self, trainer: Trainer) -> BlendReport:
        """Let the rows of `trainer` carry marks, and put this report before its other callbacks.

        Raises:
            ValueError: the training rows are no blend, or the trainer is none of this package.
        """
        rows = getattr(trainer, "train_dataset", None)
        blend = find_blend(rows)
        if blend is None:
            raise ValueError(
                f"`train_dataset` (`{type(rows).__name__}`) is no `BlendedRows`, so there are no "
                "sources to report: leave `BlendReport` out."
            )
        if not hasattr(trainer, "blend_report"):
            raise ValueError(
                f"`{type(trainer).__name__}` does not take marks off its batches: use `LongContextTrainer` or "
                "`LongContextSFTTrainer`."
            )
        blend.marks_sources = True
        self.names, self._sizes = blend.names, [len(dataset) for dataset in blend.datasets.values()]
        self._forget()
        trainer.blend_report = self
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def expect(self, marks: torch.Tensor, targets: torch.Tensor | None) -> None:
        """Count the tokens of a batch that the next forward of the model gets.

        Args:
            marks (`torch.Tensor` of shape `(B, t)`): of this rank's tokens; see `SOURCE_MARKS`.
            targets (`torch.Tensor` of shape `(B, t)`, *optional*): the label that each token predicts.
        """
        self._step = self._step.to(marks.device)
        self._add(_TOKENS, marks, marks > 0)
        self._add(_ROWS, marks, marks % 2 == 1)
        self._expected = None if targets is None else (marks, targets)

    def _add(self, what: int, marks: torch.Tensor, counted: torch.Tensor, values: torch.Tensor | None = None) -> None:
        sources = marks[counted] // 2 - 1
        values = torch.ones_like(sources, dtype=torch.float64) if values is None else values.double()
        self._step[:, what].index_add_(0, sources, values)

    @torch.compiler.disable
    def _read_losses(self, model: torch.nn.Module, args: tuple, output: Any) -> None:
        expected, patch = self._expected, patch_on(unwrap(model), TILED_LOSS)
        if expected is None or not model.training or not torch.is_grad_enabled():
            return
        (marks, targets), self._expected = expected, None
        counted = (targets != IGNORE_INDEX) & (marks > 0)
        logits, losses = getattr(output, "logits", None), None
        if patch is not None and patch.token_losses is not None:
            losses, patch.token_losses = patch.token_losses[counted.to(patch.token_losses.device)], None
        elif logits is not None and logits.shape[:2] == targets.shape:
            losses = _losses_of(logits.detach(), targets.to(logits.device), counted.to(logits.device))
        if losses is None:
            if not self._warned:
                logger.warning(
                    "the logs will have no loss a source: the forward of `%s` gives neither logits of every token nor "
                    "a tiled loss of ours; under TRL, set `loss_type='nll'`",
                    type(unwrap(model)).__name__,
                )
            self._warned = True
            return
        self._add(_TARGETS, marks, counted)
        self._add(_LOSS, marks, counted, losses.to(marks.device))

    # What the trainer calls

    def state(self) -> dict[str, Any]:
        sums = {name: row for name, row in zip(self.names, self._so_far.tolist())}
        return {"args": {}, "attributes": {"sources": {name: [*sums[name], size] for name, size in self._all_sizes()}}}

    def _all_sizes(self) -> list[tuple[str, int]]:
        return list(zip(self.names, self._sizes))

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._forget()
        if state.global_step:
            self._restore(state.stateful_callbacks.get(type(self).__name__))
        state.stateful_callbacks[type(self).__name__] = self.state()
        inner = unwrap(model)
        patch = patch_on(inner, TILED_LOSS)
        if patch is not None:
            patch.keeps_token_losses = True
        self._hook = inner.register_forward_hook(self._read_losses)

    def _restore(self, saved: Any) -> None:
        saved = saved[0] if isinstance(saved, list) else saved
        sources = (saved or {}).get("attributes", {}).get("sources", {})
        if set(sources) != set(self.names):
            logger.warning(
                "the checkpoint has no sums of the sources %s, so the logs count from here on", ", ".join(self.names)
            )
            return
        self._so_far = torch.tensor([sources[name][:4] for name in self.names], dtype=torch.float64)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        sums = self._step
        if dist.is_available() and dist.is_initialized():
            sums = sums.to(args.device)
            dist.all_reduce(sums)
        sums = sums.cpu()
        self._so_far, self._since_log = self._so_far + sums, self._since_log + sums
        self._step = torch.zeros_like(self._step)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is None or "loss" not in logs:
            return
        figures: dict[str, float] = {}
        for name, size, so_far, recent in zip(
            self.names, self._sizes, self._so_far.tolist(), self._since_log.tolist(), strict=True
        ):
            figures[f"tokens/{name}"] = int(so_far[_TOKENS])
            figures[f"passes/{name}"] = so_far[_ROWS] / size
            if recent[_TARGETS]:
                figures[f"loss/{name}"] = recent[_LOSS] / recent[_TARGETS]
        self._since_log = torch.zeros_like(self._since_log)
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        if self._hook is not None:
            self._hook.remove()
        patch = patch_on(unwrap(model), TILED_LOSS)
        if patch is not None:
            patch.keeps_token_losses, patch.token_losses = False, None
        self._hook = self._expected = None

    def _forget(self) -> None:
        empty = torch.zeros(len(self.names), 4, dtype=torch.float64)
        self._step, self._since_log, self._so_far = empty.clone(), empty.clone(), empty.clone()
        self._expected = None
        if self._hook is not None:
            self._hook.remove()


def sources_read(state: Any) -> dict[str, dict[str, float]]:
    """What a run read of each source, as the state of its trainer tells it; empty without a report."""
    saved = state.stateful_callbacks.get(BlendReport.__name__) or {}
    found = {}
    for name, (tokens, rows, targets, loss, size) in saved.get("attributes", {}).get("sources", {}).items():
        found[name] = {"tokens": int(tokens), "rows": int(rows), "passes": rows / size}
        if targets:
            found[name]["mean_loss"] = loss / targets
    return found


@torch.no_grad()
def _losses_of(logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The cross entropy of the counted tokens, some at a time so that no second copy of all logits is made."""
    places = counted.flatten().nonzero().squeeze(1)
    logits, targets = logits.flatten(0, 1), targets.flatten()
    losses = []
    for part in places.split(_TOKENS_AT_A_TIME):
        scores = logits[part]
        wide = scores if scores.dtype == torch.float64 else scores.float()
        losses.append(torch.nn.functional.cross_entropy(wide, targets[part], reduction="none"))
    return torch.cat(losses) if losses else logits.new_zeros(0)

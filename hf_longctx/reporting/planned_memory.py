"""`PlannedMemory`: what the planner says of the longest batch of a run, next to what the run really took.

The plan is made when training is over, for the longest micro-batch that came, so it costs nothing before the first
step and needs no guess at the length of rows. Measured is what one process took: on a GPU what tensors took at most,
on a CPU the largest resident set less what was there without the model when training began (libraries, data). Price:
at the end of a run, a few simulated layers on rank 0, some seconds; one gather of three numbers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ..adapters.instance_forward import patch_on
from ..adapters.reversible import runs_in_two_streams
from ..adapters.tiled_loss import TILED_LOSS, find_causal_lm
from ..adapters.tiled_mlp import mlp_tile_size
from ..config.run import LongContextConfig
from ..losses.tiles import choose_tile_size
from ..planner.measure import resident_bytes
from ..planner.settings import GIB, OPTIMIZERS, Settings
from .meter import cpu_memory, device_memory, peak_memory


logger = logging.getLogger(__name__)


class PlannedMemory(TrainerCallback):
    """Add planned and measured memory to the last log of a run, the one with `train_runtime`.

    On rank 0 that log gets
    - `planned_memory_gib`: of one process, for the longest micro-batch of the run;
    - `measured_memory_gib`: the largest of any process; left out where an earlier part of the program took more, or
      where the system does not tell;
    - `planned_over_measured`.

    A plan that cannot be made is a line in the log, never an error.

    Args:
        config ([`LongContextConfig`]): of the run.
        tiles_own_loss (`bool`): the trainer computes its loss in tiles of its own, as `SFTTrainer` does; these are
            planned as ours are.
    """

    def __init__(self, config: LongContextConfig, tiles_own_loss: bool) -> None:
        self.config, self.tiles_own_loss = config, tiles_own_loss
        self.rows, self.tokens = 0, 0  # of the longest micro-batch; on this rank
        self._before = 0
        self._base: int | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._forget_model()
        self.rows, self.tokens = 0, 0
        self._before, self._base = peak_memory(), _bytes_beside(model)
        self._hook = model.register_forward_pre_hook(self._see_batch, with_kwargs=True)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        if logs is None or "train_runtime" not in logs:
            return
        self._forget_model()
        ranks = gather_object([(self.rows * self.tokens, self.rows, self.tokens, self._measured())])
        if not state.is_world_process_zero:
            return
        (_, rows, tokens, _), measured = max(ranks), max(rank[-1] for rank in ranks)
        try:
            planned = self._plan(args, model, rows, tokens)
        except Exception as error:  # models do as they like on tensors without numbers; a run must not end by it
            logger.warning(f"the memory of this run was not planned: {type(error).__name__}: {error}")
            return
        figures = {"planned_memory_gib": planned / GIB}
        if measured:
            figures |= {"measured_memory_gib": measured / GIB, "planned_over_measured": planned / measured}
        figures = {name: float(f"{figure:.4g}") for name, figure in figures.items()}
        logger.info(_message(figures, rows, tokens))
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._forget_model()

    def _forget_model(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    @torch.compiler.disable
    def _see_batch(self, model: torch.nn.Module, args: tuple, batch: dict[str, object]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return  # evaluation, sanity checks and generation
        tokens = batch.get("input_ids")
        if isinstance(tokens, torch.Tensor) and tokens.numel() > self.rows * self.tokens:
            self.rows, self.tokens = tokens.shape

    def _measured(self) -> int:
        """Bytes that training took at most on this rank; 0 if unknown."""
        if peak_memory() <= self._before:
            return 0
        device = device_memory()
        if device is not None:
            return device
        return 0 if self._base is None else cpu_memory() - self._base

    def _plan(self, args, model: torch.nn.Module, rows: int, local_tokens: int) -> int:
        from ..planner.memory_plan import Planner  # its simulations import half of torch

        if not rows:
            raise ValueError("no batch with `input_ids` came")
        settings = settings_of(self.config, args, model, local_tokens * self.config.sequence_parallel_size, rows)
        settings = settings.of(
            loss_tile_size=self._loss_tile_size(model),
            mlp_tile_size=mlp_tile_size(model),
            checkpointing=args.gradient_checkpointing,
            reversible=runs_in_two_streams(model),
            offload=args.gradient_checkpointing and bool((args.gradient_checkpointing_kwargs or {}).get("offload")),
        )
        return Planner(find_causal_lm(model).config).breakdown(settings).device

    def _loss_tile_size(self, model: torch.nn.Module) -> int | None:
        base = find_causal_lm(model)
        patch, words = patch_on(base, TILED_LOSS), base.config.get_text_config().vocab_size
        if patch is not None:
            return choose_tile_size(patch.tile_size, words)
        return choose_tile_size(None, words) if self.tiles_own_loss else None


def settings_of(config: LongContextConfig, args, model: torch.nn.Module, tokens: int, rows: int) -> Settings:
    """The run of a trainer as the planner sees it, without any preset.

    Args:
        config ([`LongContextConfig`]): of the run.
        args (`TrainingArguments`): of the run.
        model (`torch.nn.Module`): what is trained; adapters included.
        tokens (`int`): of a whole row.
        rows (`int`): of a micro-batch.
    """
    optimizer = next((name for name in OPTIMIZERS if str(args.optim).split(".")[-1].lower().startswith(name)), "adamw")
    weights = next(model.parameters()).dtype
    ranks: set[Any] = {getattr(adapter, "r", None) for adapter in getattr(model, "peft_config", {}).values()} - {None}
    return Settings(
        tokens=tokens,
        rows=rows,
        sequence_parallel_size=config.sequence_parallel_size,
        world_size=args.world_size,
        weights_dtype=weights,
        compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weights,
        optimizer=optimizer if all(p.requires_grad for p in model.parameters()) else "lora",
        wrapper="fsdp2" if args.fsdp else "ddp" if args.world_size > 1 else "none",
        accumulates=args.gradient_accumulation_steps > 1,
        on_gpu=args.device.type == "cuda",
        lora_rank=max(ranks, default=Settings.lora_rank),
    )


def _bytes_beside(model: torch.nn.Module) -> int | None:
    """What this process holds in memory in addition to `model`; `None` where the system does not tell."""
    resident = resident_bytes()
    if resident is None:
        return None
    tensors = [*model.parameters(), *model.buffers()]
    storages = {x.untyped_storage().data_ptr(): x for x in (getattr(x, "_local_tensor", x) for x in tensors)}
    return resident - sum(x.untyped_storage().nbytes() for x in storages.values() if x.device.type == "cpu")


def _message(figures: dict[str, float], rows: int, tokens: int) -> str:
    planned = f"memory planned for the longest batch ({rows} x {tokens:,} tokens a process)"
    planned += f": {figures['planned_memory_gib']} GiB"
    if "measured_memory_gib" not in figures:
        return f"{planned}; not measured"
    return f"{planned}; measured: {figures['measured_memory_gib']} GiB, ratio {figures['planned_over_measured']}"

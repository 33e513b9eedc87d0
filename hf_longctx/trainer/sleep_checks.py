"""Settings under which a model would not sleep as asked: refused before the first step."""

from __future__ import annotations

from ..adapters.wrapped import unwrap
from ..config.memory import MemoryConfig
from ..data.packing.collator import fills_rows
from ..sleep.sleepers import recurrent_parameters


def refuse_sleep_settings(trainer) -> None:
    """Refuse a trainer whose arguments do not go with its [`SleepConfig`].

    Raises:
        ValueError: rows are packed, or settings exclude one another.
        NotImplementedError: a wrapper, loss or trainer that would pass by the forward over windows.
    """
    args, asked = trainer.args, f"`SleepConfig(window={trainer.sleep.window})`"
    size = trainer.long_context.sequence_parallel_size
    if size > 1:
        raise NotImplementedError(
            f"{asked} reads windows one after the other, and ranks that share a row would wait for each other, with "
            f"`sequence_parallel_size` ({size}): set it to 1."
        )
    if not trainer.uses_model_loss:
        raise NotImplementedError(
            f"{asked} is the forward of the model, and `{type(trainer).__name__}` computes its loss without it: use "
            "`LongContextTrainer`, on rows that are tokenized and labelled."
        )
    collator = trainer.data_collator
    if fills_rows(collator) or type(collator).__name__ == "DataCollatorWithFlattening":
        raise ValueError(
            f"{asked} counts windows from a row's start, and `{type(collator).__name__}` packs several documents into "
            "a row: use a collator that pads on the right."
        )
    if trainer.memory != MemoryConfig():
        raise NotImplementedError(
            f"{asked} does not go with `MemoryConfig`, whose tiles and checkpoints are of a single pass: leave "
            "`memory` out, and set `gradient_checkpointing=True` in the arguments."
        )
    _refuse_wrappers(trainer, asked)
    if trainer.compute_loss_func is not None or args.label_smoothing_factor:
        raise NotImplementedError(
            f"{asked} has logits of awake windows alone, and `compute_loss_func` and `label_smoothing_factor` want "
            "those of whole rows: leave them out."
        )


def _refuse_wrappers(trainer, asked: str) -> None:
    args = trainer.args
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            f"{asked} runs a layer several times a step, which FSDP and DeepSpeed have not been proven with: use DDP."
        )
    for name in ("torch_compile", "use_liger_kernel"):
        if getattr(args, name, False):
            raise NotImplementedError(
                f"`{name}` (True) replaces the forward of the model or its layers, which {asked} runs in passes: "
                "leave it off."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs and would use `DataParallel`, whose copies of the model do not "
            f"sleep: start one process a GPU with `torchrun --nproc_per_node {args.n_gpu} ...`."
        )
    warmup = trainer.sleep.warmup
    if warmup is None or not warmup.recurrent_steps:
        return
    if not any(parameter.requires_grad for parameter in recurrent_parameters(unwrap(trainer.model))):
        raise ValueError(
            f"`recurrent_steps` ({warmup.recurrent_steps}) trains the recurrent layers alone, and all of them are "
            "frozen: set `requires_grad` on them, or leave it out."
        )
    finds_unused = args.ddp_find_unused_parameters
    if finds_unused is None:
        finds_unused = not args.gradient_checkpointing
    if trainer.mesh.world_size > 1 and not finds_unused:
        raise ValueError(
            f"`recurrent_steps` ({warmup.recurrent_steps}) freezes parameters that DDP waits for: set "
            "`ddp_find_unused_parameters=True`."
        )

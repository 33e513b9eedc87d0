"""What does not go with a batch ramp, or not with its numbers: refused, or said, before the first step."""

from __future__ import annotations

import logging
from typing import Any

from ..config.ramp import RampConfig
from ..data.packing.collator import fills_rows
from .ramp_plan import RampPlan


logger = logging.getLogger(__name__)


def check_ramp(trainer: Any, ramp: RampConfig, groups: int) -> None:
    """Refuse arguments that a ramp cannot grow to, or that count batches themselves.

    Args:
        trainer: built, with its arguments.
        ramp ([`RampConfig`]): that is on.
        groups (`int`): the data-parallel size.
    """
    args = trainer.args
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            f"`ramp` (start {ramp.start}) changes how many micro-batches a step has, which DeepSpeed's engine counts "
            "itself: use DDP or FSDP2, or leave `ramp` out."
        )
    if args.auto_find_batch_size:
        raise NotImplementedError(
            f"`auto_find_batch_size` (True) changes the rows that `ramp` (start {ramp.start}) counts: set "
            "`per_device_train_batch_size`."
        )
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy == "batch_rebalance":
        raise NotImplementedError(
            "`train_sampling_strategy` ('batch_rebalance') assigns rows to ranks for steps of one size, and `ramp` "
            "changes it: use 'random' or 'sequential'."
        )
    scheduler = trainer.lr_scheduler
    if scheduler is not None and not trainer._created_lr_scheduler:
        raise ValueError(
            f"`optimizers` brings a `{type(scheduler).__name__}`, which counts steps, and with `ramp` the learning "
            "rate follows rows: pass `(optimizer, None)`, and set `lr_scheduler_type`."
        )
    _check_numbers(args, ramp, groups)
    if args.process_index == 0:
        _say_who_wins(trainer, strategy)


def _check_numbers(args: Any, ramp: RampConfig, groups: int) -> None:
    assert ramp.start is not None and ramp.increment is not None and ramp.rows is not None
    drawn, whole = args.train_batch_size * groups, args.train_batch_size * groups * args.gradient_accumulation_steps
    for name in ("start", "increment"):
        value = getattr(ramp, name)
        if value % drawn:
            raise ValueError(
                f"`ramp`'s `{name}` ({value}) is no multiple of the {drawn} rows that are drawn at once "
                f"(`per_device_train_batch_size` {args.train_batch_size} times {groups} "
                f"group{'s'[: groups > 1]} of processes): set it to {max(value // drawn, 1) * drawn} or "
                f"{(value // drawn + 1) * drawn}, or run other numbers of groups or of rows a device."
            )
    if ramp.start >= whole:
        raise ValueError(
            f"`ramp`'s `start` ({ramp.start}) must be below the global batch ({whole} rows: {drawn} drawn at once, "
            f"times `gradient_accumulation_steps` {args.gradient_accumulation_steps}): set more accumulation steps, "
            "or leave `ramp` out."
        )
    if (whole - ramp.start) % ramp.increment:
        raise ValueError(
            f"`ramp`'s `increment` ({ramp.increment}) does not lead from `start` ({ramp.start}) to the global batch "
            f"({whole} rows): their difference, {whole - ramp.start}, must be a multiple of it."
        )
    if ramp.rows < ramp.start:
        raise ValueError(
            f"`ramp`'s `rows` ({ramp.rows}) are fewer than its first batch ({ramp.start}): set it to the rows over "
            "which the batch grows."
        )


def _say_who_wins(trainer: Any, strategy: str) -> None:
    if strategy == "group_by_length":
        logger.warning(
            "`train_sampling_strategy` ('group_by_length') sorts rows for whole global batches, and `ramp` decides "
            "how many of them a step takes: the order stays, and steps of the ramp hold rows of more similar lengths"
        )
    if fills_rows(trainer.data_collator):
        logger.warning(
            f"`max_tokens` ({trainer.data_collator.max_tokens}) decides what a row is, and `ramp` how many rows a "
            "step has: it counts packed rows, not documents"
        )


def check_end(plan: RampPlan, steps: int, is_asked: bool) -> None:
    """Refuse a run of so many steps that ends before its ramp; `is_asked`: by `max_steps`."""
    rows = plan.batches_after(steps) * plan.micro_rows
    assert plan.ramp.rows is not None
    if rows < plan.ramp.rows:
        needed = plan.steps_for(-(-plan.ramp.rows // plan.micro_rows))
        name = f"`max_steps` ({steps})" if is_asked else f"`num_train_epochs` ({steps} steps)"
        raise ValueError(
            f"{name} ends the run after {rows} rows, before `ramp` is over ({plan.ramp.rows} rows): train at least "
            f"{needed} steps, or set fewer `rows`."
        )

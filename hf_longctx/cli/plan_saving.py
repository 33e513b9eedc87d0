"""What `hf-longctx plan` says of checkpoints: how often to save."""

from __future__ import annotations

import argparse

from ..planner.checkpoint_interval import (
    BYTES_PER_SECOND_OF_NODE,
    checkpoint_interval,
    expected_hours_between_failures,
)
from ..planner.settings import GIB, Settings


GPUS_PER_NODE = 8


def describe_saving(options: argparse.Namespace, numel: int, settings: Settings) -> str:
    """How often to save, by what a checkpoint takes and how often such a run fails."""
    hours = options.hours_between_failures
    if hours is None:
        hours = expected_hours_between_failures(options.gpus)
    seconds, taken = options.save_seconds, "one takes"
    if seconds is None and settings.optimizer == "lora":
        return "only adapters are saved: save as often as you like"
    if seconds is None:
        moments = 8 if settings.optimizer == "adamw" else 0
        size = numel * (settings.weights_dtype.itemsize + moments)
        seconds = size / (BYTES_PER_SECOND_OF_NODE * -(-options.gpus // GPUS_PER_NODE))
        taken = f"one has {size / GIB:,.1f} GiB and takes about"
    minutes = checkpoint_interval(seconds, hours) / 60
    return (
        f"{taken} {_short(seconds)} s; with a failure every {_short(hours)} hours, saving every "
        f"{_short(minutes)} minutes loses least"
    )


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 1 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"

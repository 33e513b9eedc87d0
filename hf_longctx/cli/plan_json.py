"""What `hf-longctx plan --json` holds: the plan as plain values, bytes and seconds unrounded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..planner.memory_plan import USABLE_SHARE, Planner
from ..planner.settings import GIB, Settings
from .plan_report import Cell, Speed


def facts_of(
    options: argparse.Namespace,
    planner: Planner,
    settings: Settings,
    cells: Sequence[Cell],
    best: Cell | None,
    target: int | None,
    speed: Speed,
) -> dict[str, Any]:
    """Everything that is printed; `recommended` is the place of a cell in `cells`, or `None` where no row fits."""
    return {
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in planner.model.parameters()),
        "gpus": options.gpus,
        "gpu_bytes": int(options.gpu_memory * GIB),
        "usable_share": USABLE_SHARE,
        "cpu_bytes": None if options.cpu_memory is None else int(options.cpu_memory * GIB),
        "target_tokens": target,
        "optimizer": settings.optimizer,
        "wrapper": settings.wrapper,
        "weights_dtype": str(settings.weights_dtype).removeprefix("torch."),
        "cells": [_cell(cell, speed) for cell in cells],
        "recommended": None if best is None else next(i for i, cell in enumerate(cells) if cell is best),
        "picture": None,
        "recipe": None,
    }


def _cell(cell: Cell, speed: Speed) -> dict[str, Any]:
    flops, seconds = (None, None) if cell.breakdown is None else speed.of_row(cell.settings)
    found: dict[str, Any] = {
        "preset": cell.preset.name,
        "sequence_parallel_size": cell.size,
        "longest_tokens": cell.longest,
        "model_flops": flops,
        "seconds": seconds,
    }
    if cell.breakdown is None:
        return {**found, "tokens": None, "bytes": None, "device_bytes": None, "cpu_bytes": None, "phase": None}
    kinds = asdict(cell.breakdown)
    tokens, phase, cpu = kinds.pop("tokens"), kinds.pop("phase"), kinds.pop("cpu")
    where = {"device_bytes": cell.breakdown.device, "cpu_bytes": cpu, "phase": phase}
    return {**found, "tokens": tokens, "bytes": kinds, **where}

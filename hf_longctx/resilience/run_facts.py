"""Which rows a step draws: recorded in a checkpoint, and compared with those of the run that resumes from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.packing.collator import fills_rows
from ..data.streams import split_stream
from .checkpoint_record import RUN_FILE, read_json


logger = logging.getLogger(__name__)

_NOT_COMPARED = ("world_size", "sequence_parallel_size", "split", "epoch_rows", "draws_rows")


def run_facts(trainer) -> dict[str, Any]:
    """What decides which rows a step draws, in addition to the step's number; and how many processes ran."""
    args, groups = trainer.args, trainer.mesh.data_parallel_size
    rows = args.train_batch_size * groups
    strategy = getattr(args, "train_sampling_strategy", "random")
    num_rows, sources = _count_rows(trainer)
    is_sized = num_rows is not None
    packs = fills_rows(trainer.data_collator)
    is_dealt = trainer.reads_own_shards and split_stream(trainer.train_dataset, trainer.mesh) is not None
    loader = trainer.callback_handler.train_dataloader if is_sized and sources is None else None
    return {
        "world_size": args.world_size,
        "sequence_parallel_size": trainer.mesh.sequence_parallel_size,
        "split": [args.train_batch_size, groups, args.gradient_accumulation_steps],
        "epoch_rows": None if loader is None else len(loader.dataset),
        "rows_per_optimizer_step": rows * args.gradient_accumulation_steps,
        "num_rows": num_rows,
        "ramp": _ramp_of(trainer),
        "sources": sources,
        "draws_rows": trainer._draws_rows,
        "seed": trainer.data_seed,
        "train_sampling_strategy": strategy,
        "max_tokens": trainer.data_collator.max_tokens if packs else None,
        # These orders are made for so many rows at a time, or for so many groups.
        "balanced_rows": rows if packs and not is_dealt and strategy == "random" else None,
        "sorted_rows": args.train_batch_size * args.gradient_accumulation_steps
        if strategy == "group_by_length"
        else None,
        "stream_shards": groups if is_dealt else None,
    }


def _ramp_of(trainer) -> list[int] | None:
    ramp = getattr(trainer, "ramp", None)
    return [ramp.start, ramp.increment, ramp.rows] if ramp is not None and ramp.is_on else None


def _count_rows(trainer) -> tuple[int | None, dict[str, object] | None]:
    """The rows of the data set, and what decides how often each of several sources is drawn."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Mapping):
        return len(dataset) if hasattr(dataset, "__len__") else None, None
    rows = {name: len(source) if hasattr(source, "__len__") else None for name, source in dataset.items()}
    sources = asdict(trainer.sources) | {"rows": rows}
    counts = [count for count in rows.values() if count is not None]
    return sum(counts) if len(counts) == len(rows) else None, sources


def check_rows(trainer, folder: Path) -> None:
    """Raise `ValueError` if this run would draw other rows than the one that saved `folder`, as far as it recorded."""
    path = folder / RUN_FILE
    if trainer.args.ignore_data_skip or not path.is_file():
        return
    saved = read_json(path)
    _check_kinds(path, saved)
    if saved.get("draws_rows") and trainer.args.process_index == 0:
        logger.warning(
            f"the collator or data set of the run that saved `{folder}` draws random numbers: training goes on with "
            "the same rows, but the draws are not those of the uninterrupted run, because the trainer fetches ahead "
            "of the random state it saves."
        )
    facts, had = run_facts(trainer), saved.get("rows_per_optimizer_step")
    splits_alike = saved.get("split", facts["split"]) == facts["split"]
    if saved.get("epoch_rows") and had and saved["epoch_rows"] % had and not splits_alike:
        raise ValueError(
            f"`{path}` says that an epoch has {saved['epoch_rows']} rows, which steps of {had} do not divide: how its "
            "last step is filled depends on rows a device, groups and accumulation steps. Keep them at "
            f"{', '.join(map(str, saved['split']))} (this run has {', '.join(map(str, facts['split']))}), or set "
            "`ignore_data_skip=True` to begin the data anew."
        )
    for name, value in facts.items():
        if name not in _NOT_COMPARED and saved.get(name, value) != value:
            raise ValueError(
                f"`{path}` says `{name}` {saved[name]}, and this run has {value}: other rows would be drawn than by "
                f"the run it continues, which had {saved.get('world_size')} processes, `sequence_parallel_size` "
                f"{saved.get('sequence_parallel_size')}. Keep it (`per_device_train_batch_size` times groups times "
                "`gradient_accumulation_steps` are the rows of a step), or set `ignore_data_skip=True` to begin the "
                "data anew."
            )


def _check_kinds(path: Path, saved: dict[str, Any]) -> None:
    """What is calculated with below is what a run writes, also in a record that has no seal."""
    for name, kind in (("epoch_rows", int), ("rows_per_optimizer_step", int), ("split", list)):
        value = saved.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"`{path}` says `{name}` {value!r}, which no run writes: resume from another checkpoint.")

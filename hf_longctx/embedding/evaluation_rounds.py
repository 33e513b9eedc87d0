"""Evaluation on several groups of ranks: every row counts once, in the batch that one process would have it in.

How: batches go to groups in turn. What is left for the last round is no full batch for every group: a loss that looks
at its own rows only gets the batches that there are, and groups without one run another that does not count; a loss
that gathers negatives from all groups gets all rows that are left on every group, and gathers nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .held_models import Losses, each_loss


# In a batch of evaluation: how many rows it counts for, and whether no negatives come from other groups.
ROWS, ALONE = "evaluated_rows", "evaluated_alone"


def my_rounds(batches: Iterable[list], groups: int, rank: int, gathers: bool) -> Iterator[tuple[list, int, bool]]:
    """My batch of every round, the rows that it counts for, and whether negatives of other groups are left out.

    Args:
        batches (`Iterable[list]`): of one process, in order; only the last one may be shorter.
        groups (`int`), rank (`int`): of the `dp` axis.
        gathers (`bool`): whether a loss takes negatives from all groups.
    """
    window: list[list] = []
    for batch in batches:
        window.append(batch)
        if len(window) == groups and len(batch) == len(window[0]):
            yield window[rank], len(window[rank]), False
            window = []
    if window and gathers:
        left = [row for batch in window for row in batch]
        yield left, len(left) if rank == 0 else 0, True
    elif window:
        mine = window[rank] if rank < len(window) else window[0]
        yield mine, len(mine) if rank < len(window) else 0, False


class _Rounds(Dataset):
    """My rounds of a map-style data set, one an item."""

    def __init__(self, dataset, rounds: list[tuple[list[int], int, bool]]) -> None:
        self.dataset, self.rounds = dataset, rounds

    def __len__(self) -> int:
        return len(self.rounds)

    def __getitem__(self, index: int):
        indices, rows, alone = self.rounds[index]
        return [self.dataset[each] for each in indices], rows, alone


class _StreamedRounds(IterableDataset):
    """The same of a stream, which every group reads whole."""

    def __init__(self, dataset, batch_size: int, drop_last: bool, groups: int, rank: int, gathers: bool) -> None:
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.how = (groups, rank, gathers)

    def __iter__(self) -> Iterator[tuple[list, int, bool]]:
        return my_rounds(self._batches(), *self.how)

    def _batches(self) -> Iterator[list]:
        batch = []
        for row in self.dataset:
            batch.append(row)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch and not self.drop_last:
            yield batch


class _RoundCollator:
    """The batch of one round, with what it counts for."""

    def __init__(self, collate) -> None:
        self.collate = collate

    def __call__(self, rounds: list[tuple[list, int, bool]]) -> dict:
        ((rows, count, alone),) = rounds
        return {**self.collate(rows), ROWS: count, ALONE: alone}


def in_rounds(loader: DataLoader, groups: int, rank: int, gathers: bool) -> DataLoader:
    """A loader of one process' batches as the loader of one group's rounds."""
    arguments = {"batch_size": 1, "collate_fn": _RoundCollator(loader.collate_fn), "pin_memory": loader.pin_memory}
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__getitem__"):
        size = loader.batch_size
        stream = _StreamedRounds(loader.dataset, size, loader.drop_last, groups, rank, gathers)
        return DataLoader(stream, **arguments)
    rounds = list(my_rounds(loader.batch_sampler, groups, rank, gathers))
    workers = {name: getattr(loader, name) for name in ("num_workers", "prefetch_factor", "persistent_workers")}
    return DataLoader(_Rounds(loader.dataset, rounds), **arguments, **workers)


def gathers_negatives(losses: Losses) -> bool:
    """Whether a loss takes negatives from other ranks."""
    return any(getattr(part, "gather_across_devices", False) for loss in each_loss(losses) for part in loss.modules())


@contextlib.contextmanager
def without_gathering(losses: Losses) -> Iterator[None]:
    """A block in which no loss takes negatives from other ranks."""
    parts = [part for loss in each_loss(losses) for part in loss.modules()]
    parts = [part for part in parts if getattr(part, "gather_across_devices", False)]
    for part in parts:
        part.gather_across_devices = False
    try:
        yield
    finally:
        for part in parts:
            part.gather_across_devices = True


def count_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch, whose columns may each be one flat row."""
    for key, value in inputs.items():
        if key.endswith("_cu_seq_lens_q"):
            return len(value) - 1
    return next((len(x) for x in inputs.values() if isinstance(x, torch.Tensor) and x.ndim), 1)


class EvaluationSums:
    """Losses of batches, weighed by rows, in double precision."""

    def __init__(self) -> None:
        self.total, self.rows = 0.0, 0

    def add(self, loss: torch.Tensor, rows: int, skip_nonfinite: bool) -> None:
        value = float(loss.detach())
        if rows and (math.isfinite(value) or not skip_nonfinite):
            self.total += value * rows
            self.rows += rows

    def mean(self, accelerator) -> float | None:
        """Over all ranks; `None` if no row was counted."""
        sums = torch.tensor([self.total, self.rows], dtype=torch.float64, device=accelerator.device)
        total, rows = accelerator.reduce(sums, "sum").tolist()
        return total / rows if rows else None

"""Who reads which rows: the `P` ranks of a group read the same, different groups read different ones.

Training uses accelerate's own sharding with the data-parallel size and rank instead of the process count, so epochs,
shuffling and resuming are exactly those of a data-parallel run with one process a group. Evaluation must count each
row once: where the rows do not divide evenly, the last groups draw a `DummySample`, computed and not counted, so
that no rank waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader, IterableDataset


@dataclass(frozen=True)
class DummySample:
    """A row that only keeps a rank busy. Its labels are ignored."""

    row: object


class FilledRows:
    """A map-style data set that goes on with dummy samples after its last row.

    `len()` is the number of real rows. `total(B, dp)` is the number to draw so that every group sees full batches.
    """

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index] if index < len(self.dataset) else DummySample(self.dataset[0])

    def total(self, batch_size: int, data_parallel_size: int) -> int:
        if data_parallel_size == 1:
            return len(self)
        step = batch_size * data_parallel_size
        return math.ceil(len(self) / step) * step


class FilledStream(IterableDataset):
    """One group's rows of a stream, in batches of `batch_size`; every group yields the same number of rows."""

    def __init__(self, dataset, batch_size: int, data_parallel_size: int, data_parallel_rank: int) -> None:
        self.dataset = dataset
        self.batch_size, self.size, self.rank = batch_size, data_parallel_size, data_parallel_rank

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator:
        window, last, step = [], None, self.batch_size * self.size
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for row in self.dataset:
            window.append(row)
            last = row
            if len(window) == step:
                yield from window[mine]
                window = []
        if window:
            if self.size > 1:
                window += [DummySample(last)] * (step - len(window))
            yield from window[mine]


def evaluation_loader(dataset, data_parallel_size: int, data_parallel_rank: int, **arguments) -> DataLoader:
    """One group's batches of an evaluation set, each row counted once over all groups.

    Args:
        dataset: map-style or iterable.
        arguments: of `DataLoader`, with `batch_size` and `collate_fn`; the collator must know [`DummySample`].
    """
    batch_size = arguments["batch_size"]
    if isinstance(dataset, IterableDataset):
        # One worker reads the stream: several would each yield all of it, or a part that the others do not know.
        single = {
            "num_workers": 0,
            "prefetch_factor": None,
            "persistent_workers": False,
            "multiprocessing_context": None,
        }
        stream = FilledStream(dataset, batch_size, data_parallel_size, data_parallel_rank)
        return DataLoader(stream, **{**arguments, **single})
    rows = FilledRows(dataset)
    total = rows.total(batch_size, data_parallel_size)
    first = range(data_parallel_rank * batch_size, total, batch_size * data_parallel_size)
    mine = [index for start in first for index in range(start, min(start + batch_size, total))]
    return DataLoader(rows, sampler=mine, **arguments)

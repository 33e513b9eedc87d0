"""A training stream without an end: it is read again from its start each time it ends.

The length of a stream is unknown, and ranks that read different parts would end at different steps: one rank would
fill a step of several batches, or save, while the others do not. Without an end there is nothing to agree on, and a
resumed run skips what was trained, however often the stream was read.
Price: a resumed run reads all of it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch.utils.data import DataLoader, IterableDataset


class EndlessBatches(IterableDataset):
    """The batches of a stream, again and again; `set_epoch` of the stream is called before each pass.

    Args:
        loader (`DataLoader`): of the stream, with its workers. All of them end a pass before the next one begins.

    Raises on reading:
        ValueError: the stream has no row.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator:
        for epoch in itertools.count():
            if hasattr(self.loader.dataset, "set_epoch"):
                self.loader.dataset.set_epoch(epoch)
            is_empty = True
            for batch in self.loader:
                is_empty = False
                yield batch
            if is_empty and epoch:
                return  # it can be read only once
            if is_empty:
                raise ValueError(
                    "`train_dataset` is a stream without a row (in this process's shards, if it is sharded): check "
                    "what it was filtered by."
                )


def endless_loader(loader: DataLoader) -> DataLoader:
    """`loader` without an end. It has no workers of its own, so it reads those of `loader` in turn."""
    return DataLoader(EndlessBatches(loader), batch_size=None, collate_fn=_as_it_is)


def _as_it_is(batch: object) -> object:
    return batch

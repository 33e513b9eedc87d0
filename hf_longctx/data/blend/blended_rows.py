"""`BlendedRows`: several corpora as one data set, in exact proportions at every prefix.

What: row `i` of a blend is a fixed row of one of its sources. Any sampler and loader takes it; read in order, every
prefix holds each source's share to within one row, small sources are read again in a new order each pass, and a run
that goes on needs to know its position and nothing else. How: [`proportions`][hf_longctx.data.blend.proportions] for
the sources, [`passes`][hf_longctx.data.blend.passes] for their rows, both written down once as an index. Price: 6
bytes a row on disk, and a lookup a row.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .blend_index import BlendIndex, build_in_memory, open_or_build
from .blend_settings import read_blends, read_cache_dir, read_num_rows
from .passes import Passes
from .proportions import Proportions
from .source_content import SourceContent


# A column with one number a token: twice the source's number from 1 on, and 1 more at the first token of a row.
SOURCE_MARKS = "blend_source"


class BlendedRows(Dataset):
    """Rows of several sources in given proportions, as one map-style data set.

    Args:
        sources (`Mapping[str, tuple]`, or a list of such mappings):
            Name to `(data set, weight)`; weights are relative to one another. A list is a schedule: one blend after
            the other, each over its part of `num_rows`. A later blend may give a weight alone for a source that an
            earlier one has, leave sources out and bring new ones.
        num_rows (`int` or `list[int]`): rows of the blend, or of each blend of a list.
        seed (`int`, *optional*, defaults to 0): of the order of each pass over a source.
        cache_dir (`str`, *optional*):
            Folder of the index, which one process builds and all map into memory. Unset, every process keeps its own
            in memory.

    Attributes:
        names (`tuple[str]`): the sources, in order.
        index: two arrays, `sources` and `rows`: which row of which source each row is.
        marks_sources (`bool`): whether rows carry the column that [`BlendReport`] reads.

    Read it in order: its order is a random one already, and a sampler that shuffles it loses the proportions of
    prefixes. The trainers of this package do so by themselves. Every process may read any part of it.

    Raises:
        ValueError: a weight that is not above 0 and finite, an empty source, a `cache_dir` that cannot be written, or
            an index there that was built when the sources were others.
        NotImplementedError: a source is a stream.

    Example:
    ```python
    rows = BlendedRows({"code": (code, 0.3), "books": (books, 0.7)}, num_rows=1_000_000, cache_dir="blend")
    ```
    """

    def __init__(
        self,
        sources: Mapping[str, tuple] | Sequence[Mapping[str, Any]],
        num_rows: int | Sequence[int],
        *,
        seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        self.datasets, self.weights = read_blends(sources)
        self.num_rows = read_num_rows(num_rows, len(self.weights))
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise ValueError(f"`seed` ({seed!r}) must be a whole number.")
        self.names, self.seed, self.marks_sources = tuple(self.datasets), int(seed), False
        self._sizes = [len(dataset) for dataset in self.datasets.values()]
        self.proportions = Proportions(self.weights, self.num_rows)
        self._cache: tuple[str, dict[str, Any], dict[str, SourceContent]] | None = None
        folder = read_cache_dir(cache_dir)
        if folder is not None:
            settings = {"names": self.names, "seed": self.seed, "num_rows": self.num_rows}
            settings["weights"] = self.weights.tolist()
            contents = {name: SourceContent(dataset) for name, dataset in self.datasets.items()}
            self._cache = (folder, settings, contents)
        self.index = self._open()

    def _open(self) -> BlendIndex:
        passes = [Passes(size, self.seed, name) for name, size in zip(self.names, self._sizes)]
        if self._cache is None:
            return build_in_memory(self.proportions, passes)
        folder, settings, contents = self._cache
        return open_or_build(folder, settings, contents, self.proportions, passes)

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled with all its numbers; the worker maps the file itself.
        return {**vars(self), "index": None} if self._cache is not None else dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.index is None:
            self.index = self._open()

    def __len__(self) -> int:
        return len(self.index.sources)

    def locate(self, position: int) -> tuple[str, int]:
        """The source of the row at `position`, and its number there."""
        place = self._place(position)
        return self.names[self.index.sources[place]], int(self.index.rows[place])

    def _place(self, position: int) -> int:
        try:
            position = operator.index(position)
        except TypeError:
            raise ValueError(
                f"a blend is read by the number of a row, and not by {position!r:.60}: for a part of it, use "
                "`torch.utils.data.Subset`."
            ) from None
        place = position + len(self) if position < 0 else position
        if not 0 <= place < len(self):
            raise IndexError(f"row {position} is outside of a blend of {len(self):,} rows")
        return place

    def __getitem__(self, position: int) -> Mapping:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Mapping]:
        """Several rows, those of a source read from it at once."""
        places = np.array([self._place(position) for position in positions], dtype=np.int64)
        sources, rows = self.index.sources[places], self.index.rows[places]
        found: list[Any] = [None] * len(places)
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            dataset, wanted = self.datasets[self.names[source]], rows[mine].tolist()
            read = dataset.__getitems__(wanted) if hasattr(dataset, "__getitems__") else [dataset[i] for i in wanted]
            for place, row in zip(mine.tolist(), read):
                found[place] = self._marked(row, source) if self.marks_sources else row
        return found

    def _marked(self, row: Any, source: int) -> dict[str, Any]:
        if not isinstance(row, Mapping) or "input_ids" not in row:
            raise ValueError(
                f"a row of source `{self.names[source]}` has no `input_ids`, whose tokens a `BlendReport` counts: "
                "tokenize first."
            )
        marks = np.full(len(row["input_ids"]), 2 * (source + 1), dtype=np.int64)
        marks[:1] += 1
        return {**row, SOURCE_MARKS: marks}

    def counts(self, num_rows: int | None = None) -> dict[str, int]:
        """Rows of every source among the first `num_rows` of the blend; all of them by default."""
        counts = np.zeros(len(self.names), dtype=np.int64)
        if num_rows is not None and (not isinstance(num_rows, (int, np.integer)) or num_rows < 0):
            raise ValueError(f"`num_rows` ({num_rows!r}) must be a number of rows of the blend, or be left out.")
        stop = len(self) if num_rows is None else min(num_rows, len(self))
        for start in range(0, stop, 2**20):
            part = self.index.sources[start : min(start + 2**20, stop)]
            counts += np.bincount(part, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist()))

    def lengths_of(self, measured: Sequence[np.ndarray]) -> np.ndarray:
        """The length of every row of the blend, from those of every row of each source."""
        lengths = np.empty(len(self), dtype=np.int64)
        for start in range(0, len(self), 2**20):
            part = slice(start, start + 2**20)
            sources, rows = self.index.sources[part], self.index.rows[part]
            for source, known in enumerate(measured):
                mine = sources == source
                lengths[part][mine] = known[rows[mine]]
        return lengths


def find_blend(dataset: object) -> BlendedRows | None:
    """The blend below a data set that reads another one in order, such as a `Subset` or a `PackedDataset`."""
    while dataset is not None and not isinstance(dataset, BlendedRows):
        dataset = getattr(dataset, "dataset", None)
    return dataset

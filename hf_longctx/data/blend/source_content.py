"""What a source of a blend is made of, so that an index can tell a source that changed since it was built.

How: all values of a `datasets.Dataset`, up to `MOST_BYTES` of them, and of any other data set up to `MOST_READ` rows.
What is larger is compared by rows that are spread evenly over it. A hash is of values, whatever holds them, so a copy,
another file format and other chunks are the same source. Price: a second a gigabyte, and only where the index is built
or where the data set cannot prove that it comes from the same files.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np


MOST_BYTES = 2 * 10**9  # of a `datasets.Dataset`
MOST_READ = 1024  # rows of any other data set, and of a larger one
_READ_TWICE = 16  # rows that are read again: does the source make other rows each time?
_BATCH = 1000


class SourceContent:
    """What an index stores about one source.

    Args:
        dataset: that has a length and rows.

    Attributes:
        rows (`int`): of the source.
        origin (`str` or `None`): what its library says that it was made of. Equal ones have equal rows; different
            ones may.
        hash (`str` or `None`): of its rows; `None` if it makes other rows each time.
        is_whole (`bool`): whether that is of all rows.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.rows = len(dataset)

    @cached_property
    def origin(self) -> str | None:
        if not _is_arrow(self._dataset):
            return None
        files = [os.stat(file["filename"]) for file in self._dataset.cache_files]
        return f"{self._dataset._fingerprint} {[(file.st_size, file.st_mtime_ns) for file in files]}"

    @property
    def is_whole(self) -> bool:
        return self.rows <= MOST_READ or (_is_arrow(self._dataset) and self._dataset.data.nbytes <= MOST_BYTES)

    @cached_property
    def hash(self) -> str | None:
        is_arrow = _is_arrow(self._dataset) and self.is_whole
        # A transform of a `datasets.Dataset` is applied where a row is read, so some of its rows are read, too.
        places = self._spread(_READ_TWICE if is_arrow else MOST_READ)
        checksum = hashlib.blake2b("".join(self._read(places)).encode(), digest_size=16)
        again = self._spread(_READ_TWICE)
        if self._read(again) != self._read(again):
            return None
        if is_arrow:
            _add_arrow(checksum, self._dataset)
        return checksum.hexdigest()

    def facts(self) -> dict[str, Any]:
        """As they are stored beside the index."""
        return {name: getattr(self, name) for name in ("rows", "origin", "hash", "is_whole")}

    def _spread(self, count: int) -> list[int]:
        return sorted({round(place) for place in np.linspace(0, self.rows - 1, count)})

    def _read(self, places: list[int]) -> list[str]:
        return [_text(self._dataset[place]) for place in places]


def _is_arrow(dataset: Any) -> bool:
    hub = sys.modules.get("datasets")
    return hub is not None and isinstance(dataset, hub.Dataset)


def _add_arrow(checksum: Any, dataset: Any) -> None:
    """All values of all columns, in order of rows."""
    dataset = dataset.with_format("arrow")
    for start in range(0, len(dataset), _BATCH):
        table = dataset[start : start + _BATCH]
        for name in sorted(table.column_names):
            checksum.update(name.encode())
            column = table.column(name).combine_chunks()
            for part in column.chunks if hasattr(column, "chunks") else [column]:
                _add_array(checksum, part)


def _add_array(checksum: Any, array: Any) -> None:
    import pyarrow

    kind = array.type
    if array.null_count == 0 and (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        checksum.update(array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64).data)
        _add_array(checksum, array.flatten())
    elif array.null_count == 0 and pyarrow.types.is_integer(kind):
        checksum.update(array.to_numpy(zero_copy_only=False).astype(np.int64).data)
    else:
        checksum.update(repr(array.to_pylist()).encode())


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key!r}:{_text(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, (str, bytes, int, float, type(None))):
        return repr(value)
    if hasattr(value, "tolist"):  # tensors and arrays
        return _text(value.tolist())
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    return type(value).__name__

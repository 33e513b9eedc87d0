"""Data sets whose items are whole rows of documents: `PackedDataset` for map-style data, `PackedStream` for streams.

An item is a `PackedRow`, a list of documents that fit the budget together; `PackingCollator` flattens it. Documents
stay as the data set gives them, apart from the cut of one that is longer than the budget. Price: the lengths of all
documents are read once, from a length column or the offsets of an arrow column where there are any.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from numbers import Integral

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..blend.blended_rows import BlendedRows
from .lengths import (
    Packing,
    Piece,
    balanced_order,
    cut_documents,
    pack_lengths,
    validate_long_documents,
    validate_max_tokens,
    validate_strategy,
)


class PackedRow(list):
    """Documents (`dict`s) that share one row. A list type of its own, so that a collator can tell it from a batch."""


def measure_lengths(dataset: Dataset | Sequence[Mapping], length_column: str = "length") -> np.ndarray:
    """Tokens of every row of a map-style data set.

    Args:
        dataset (`datasets.Dataset` or any map-style data set): rows are mappings with `input_ids`. A row that already
            packs documents (TRL's `seq_lengths`) counts as one.
        length_column (`str`, *optional*, defaults to `"length"`): a column that is believed where it holds whole
            numbers, so that no tokens are read.

    Returns:
        `np.ndarray` of 64-bit integers.

    Raises:
        ValueError: there are no `input_ids`.
    """
    if isinstance(dataset, BlendedRows):
        return dataset.lengths_of([measure_lengths(source, length_column) for source in dataset.datasets.values()])
    hub = sys.modules.get("datasets")
    # A transform makes its columns on the fly, so only the rows tell them.
    if hub is not None and isinstance(dataset, hub.Dataset) and dataset.format["type"] != "custom":
        return _lengths_from_arrow(dataset, length_column)
    return np.fromiter((_length_of_row(dataset[i], length_column) for i in range(len(dataset))), np.int64)


class PackedDataset(Dataset):
    """Rows of several documents over a map-style data set: item `i` is a [`PackedRow`].

    Args:
        dataset (`datasets.Dataset` or any map-style data set): tokenized documents.
        max_tokens (`int`): the budget of a row, in tokens.
        strategy, long_documents, seed: see [`pack_lengths`].
        lengths (`Sequence[int]`, *optional*): tokens of every document; measured by [`measure_lengths`] otherwise.

    `.packing` ([`Packing`]) tells which documents share a row, and what rows cost.

    Raises:
        ValueError: see [`pack_lengths`] and [`measure_lengths`]; on reading, a document whose length was another one.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[Mapping],
        max_tokens: int,
        *,
        strategy: str = "best_fit_decreasing",
        long_documents: str = "error",
        seed: int | None = 0,
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self.dataset = dataset
        self.lengths = measure_lengths(dataset) if lengths is None else np.asarray(lengths)
        if len(self.lengths) != len(dataset):
            raise ValueError(
                f"`lengths` has {len(self.lengths)} entries, but the data set has {len(dataset)} rows: give the "
                "tokens of every row, or leave `lengths` out."
            )
        if len(dataset):
            _length_of_row(dataset[0])  # lengths alone do not tell that there are tokens
        self.packing = pack_lengths(
            self.lengths, max_tokens, strategy=strategy, long_documents=long_documents, seed=seed
        )

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> PackedRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[PackedRow]:
        """Several rows, their documents read from the data set at once."""
        bins = [self.packing[index] for index in indices]
        pieces = [piece for pieces in bins for piece in pieces]
        wanted = [piece.row for piece in pieces]
        if hasattr(self.dataset, "__getitems__"):
            documents = self.dataset.__getitems__(wanted)
        else:
            documents = [self.dataset[row] for row in wanted]
        cut = (self._cut(document, piece) for document, piece in zip(documents, pieces))
        return [PackedRow(islice(cut, len(pieces))) for pieces in bins]

    def _cut(self, document: Mapping, piece: Piece) -> Mapping:
        expected, found = self.lengths[piece.row], len(document["input_ids"])
        if found != expected:
            raise ValueError(
                f"row {piece.row} has {found} `input_ids`, but was packed as {expected} tokens: its length column or "
                "the `lengths` given count something else; drop them, or count tokens."
            )
        return cut_document(document, piece.start, piece.stop)


class PackedStream(IterableDataset):
    """Rows of several documents over a stream: yields [`PackedRow`]s, each document whole and in exactly one of them.

    Documents are read and packed `buffer_size` at a time, and rows come in full steps of `group_size`. Documents of
    the least full rows wait for the next buffer, with `"in_order"` those of the last rows, which are then the same as
    without buffers; at the end everything is yielded.

    Args:
        dataset (`datasets.IterableDataset` or any iterable): tokenized documents.
        max_tokens (`int`): the budget of a row, in tokens.
        strategy, long_documents, seed: see [`pack_lengths`].
        buffer_size (`int`, *optional*, defaults to 1000): documents that are looked at together.
        group_size (`int`, *optional*, defaults to 1):
            Rows of one step over all data-parallel ranks. Above 1 they come in a random order in which those of one
            step cost nearly the same, see [`balanced_order`], unless `"in_order"`.
        linear_tokens (`float`, *optional*, defaults to `12 * 1024`): 12 times the hidden size; see [`packing_cost`].

    Raises:
        ValueError: a setting out of range; on reading, see [`pack_lengths`].
    """

    def __init__(
        self,
        dataset: Iterable[Mapping],
        max_tokens: int,
        *,
        strategy: str = "best_fit_decreasing",
        long_documents: str = "error",
        seed: int | None = 0,
        buffer_size: int = 1000,
        group_size: int = 1,
        linear_tokens: float = 12 * 1024,
    ) -> None:
        validate_max_tokens(max_tokens)
        validate_strategy(strategy)
        validate_long_documents(long_documents)
        validate_buffer_size(buffer_size)
        balanced_order([], group_size, seed=0)  # refuses what is out of range
        self.dataset, self.max_tokens, self.buffer_size = dataset, max_tokens, buffer_size
        self.strategy, self.long_documents, self.seed = strategy, long_documents, seed
        self.group_size, self.linear_tokens, self.epoch = group_size, linear_tokens, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order of rows, and tell the stream below."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[PackedRow]:
        stream, num_read = iter(self.dataset), 0
        waiting: list[Mapping] = []
        for turn in count():
            buffer = list(islice(stream, self.buffer_size))
            if not buffer and not waiting:
                return
            lengths = [_length_of_row(document) for document in buffer]
            pieces = cut_documents(lengths, self.max_tokens, self.long_documents, first_row=num_read)
            num_read += len(buffer)
            cuts = zip(*(array.tolist() for array in pieces))
            documents = waiting + [cut_document(buffer[row], start, stop) for row, start, stop in cuts]
            lengths = [len(document["input_ids"]) for document in documents]
            packing = pack_lengths(lengths, self.max_tokens, strategy=self.strategy, seed=self.seed)
            rows, held_back = self._deal(packing, turn, is_last=not buffer)
            yield from (PackedRow(documents[piece.row] for piece in packing[row]) for row in rows)
            waiting = [documents[piece.row] for row in held_back for piece in packing[row]]

    def _deal(self, packing: Packing, turn: int, is_last: bool) -> tuple[list[int], list[int]]:
        """The rows of a buffer in the order in which they come, and those whose documents wait."""
        in_order = self.strategy == "in_order"
        fullest_first = np.arange(len(packing)) if in_order else np.argsort(-packing.bin_tokens, kind="stable")
        num_waiting = 0 if is_last else len(packing) % self.group_size or self.group_size
        split = max(len(packing) - num_waiting, 0)
        rows, held_back = np.sort(fullest_first[:split]), np.sort(fullest_first[split:])
        if self.group_size > 1 and not in_order:
            costs, seed = packing.costs(self.linear_tokens)[rows], self.seed or 0
            rows = rows[balanced_order(costs, self.group_size, seed=seed, epoch=(self.epoch, turn))]
        return rows.tolist(), held_back.tolist()


def cut_document(document: Mapping, start: int, stop: int) -> Mapping:
    """Tokens `start` to `stop` of a document: every value with one entry a token is cut, the others are kept.

    `seq_lengths`, the documents inside a row that TRL packed, become those of the part.
    """
    num_tokens = len(document["input_ids"])
    if start == 0 and stop == num_tokens:
        return document
    part = {}
    for key, value in document.items():
        if key == "seq_lengths" and value is not None:
            bounds = np.concatenate(([0], np.cumsum(np.asarray(value)))).clip(start, stop)
            value = [length for length in np.diff(bounds).tolist() if length]
        elif _has_one_entry_a_token(value, num_tokens):
            value = value[start:stop]
        part[key] = value
    return part


def validate_buffer_size(buffer_size: int) -> None:
    """Raise `ValueError` unless `buffer_size` is at least 1."""
    if buffer_size < 1:
        raise ValueError(f"`buffer_size` ({buffer_size}) must be at least 1: the documents that are packed together.")


def _has_one_entry_a_token(value: object, num_tokens: int) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim > 0 and len(value) == num_tokens
    return isinstance(value, (list, tuple)) and len(value) == num_tokens


def _length_of_row(row: Mapping, length_column: str | None = None) -> int:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"a row is a `{type(row).__name__}`, but a document must be a mapping with `input_ids`: tokenize first."
        )
    if length_column is not None and isinstance(row.get(length_column), Integral):
        return int(row[length_column])
    _check_tokenized(row)
    return len(row["input_ids"])


def _lengths_from_arrow(dataset, length_column: str) -> np.ndarray:
    import pyarrow
    from pyarrow import compute

    has_lengths = length_column in dataset.column_names and pyarrow.types.is_integer(
        dataset.features.arrow_schema.field(length_column).type
    )
    if not has_lengths:
        _check_tokenized(dataset.column_names)
    column = length_column if has_lengths else "input_ids"
    lengths = [np.zeros(0, np.int64)]
    for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000):
        values = table.column(column)
        values = values if has_lengths else compute.list_value_length(values)
        lengths.append(compute.fill_null(values, 0).to_numpy().astype(np.int64))
    return np.concatenate(lengths)


def _check_tokenized(columns: Iterable[str]) -> None:
    if "input_ids" not in columns:
        raise ValueError(
            f"there is no `input_ids` among the columns ({', '.join(columns)}), and packing counts tokens: tokenize "
            "the documents first."
        )

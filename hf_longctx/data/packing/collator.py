"""Flatten documents into one row without padding, and say where each begins.

What: `PackingCollator` turns a batch of documents into tensors of shape `(1, T)` with positions that restart and the
bounds that the kernels read (`cu_seq_lens_*`, `seq_idx`). It makes what transformers' `DataCollatorWithFlattening`
and TRL's padding-free collator make, also from rows that are packed already, and checks its input: a row that is
padded, empty or too long raises, with its number. Price: one copy of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...parallel.shard import IGNORE_INDEX
from ..streams import is_stream
from .datasets import PackedDataset, PackedRow, PackedStream, cut_document, validate_buffer_size
from .document_columns import DocumentColumns, read_document
from .lengths import cut_documents, validate_long_documents, validate_max_tokens, validate_strategy


if TYPE_CHECKING:
    from torch.utils.data import Dataset, IterableDataset


@dataclass(frozen=True, kw_only=True)
class PackingCollator:
    """Flatten a batch of documents into one row.

    Args:
        max_tokens (`int`, *optional*):
            Most tokens of a row. The collator only checks it; [`PackingCollator.pack`] makes the rows that keep it.
        strategy (`str`, *optional*, defaults to `"best_fit_decreasing"`): see [`pack_lengths`].
        long_documents (`str`, *optional*, defaults to `"error"`): see [`pack_lengths`].
        pad_to_multiple_of (`int`, *optional*):
            Fill the row up to a multiple of it with one more document of pad tokens, which no loss counts.
        pad_token_id (`int`, *optional*, defaults to 0): token of that document.
        position_ids_start (`int`, *optional*, defaults to 0):
            Position of the first token of each document. RoBERTa and similar models use `pad_token_id + 1`, 2. A
            document whose own `position_ids` begin above 0, such as the second part of a longer one, keeps them.
        mask_first_label (`bool`, *optional*, defaults to `True`):
            Give the first token of each document the label -100: no token of its document predicts it, and the last
            token of the document before must not. `False` for a masked language model, whose labels stand at their own
            tokens.
        buffer_size (`int`, *optional*, defaults to 1000): see [`PackedStream`].

    A call takes rows that are documents (mappings with `input_ids`), [`PackedRow`]s, rows packed already (TRL's
    `seq_lengths`, or `seq_idx`, the document of every token), or any mix. Labels are the row's `labels`; without them
    the `input_ids`, of which TRL's `completion_mask` and `assistant_masks` leave out the tokens that they mark 0.

    Returns of a call:
        `dict`: `input_ids`, `labels`, `position_ids` and every other column with one number a token that all documents
        have, of shape `(1, T)`, 64-bit integers (or floats); `seq_idx` of shape `(1, T)`, `cu_seq_lens_q` and
        `cu_seq_lens_k` of shape `(documents + 1,)`, 32-bit integers; `max_length_q` and `max_length_k`, `int`. No
        `attention_mask`: a model that sees one ignores the bounds.

    Raises on a call:
        ValueError: an empty or padded row, columns of different lengths, positions or labels that are not whole
            numbers, positions that skip within a document, or more than `max_tokens` tokens.
    """

    max_tokens: int | None = None
    strategy: str = "best_fit_decreasing"
    long_documents: str = "error"
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0
    position_ids_start: int = 0
    mask_first_label: bool = True
    buffer_size: int = 1000

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            validate_max_tokens(self.max_tokens)
        validate_strategy(self.strategy)
        validate_long_documents(self.long_documents)
        validate_buffer_size(self.buffer_size)
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` ({self.pad_to_multiple_of}) must be at least 1, or `None`.")

    def pack(
        self,
        dataset: Dataset | IterableDataset,
        *,
        lengths: Sequence[int] | np.ndarray | None = None,
        seed: int | None = 0,
        group_size: int = 1,
        linear_tokens: float = 12 * 1024,
    ) -> PackedDataset | PackedStream:
        """The rows of `dataset` that this collator flattens one at a time, within `max_tokens`.

        Args:
            dataset: map-style or a stream, of `torch` or `datasets`.
            lengths (`Sequence[int]`, *optional*): tokens of every document of a map-style data set.
            seed (`int`, *optional*, defaults to 0): see [`pack_lengths`].
            group_size, linear_tokens: of a stream, see [`PackedStream`]; [`BalancedSampler`] orders map-style rows.

        Returns:
            [`PackedDataset`], or [`PackedStream`] for a stream.

        Raises:
            ValueError: `max_tokens` is not set, or see these classes.
        """
        if self.max_tokens is None:
            raise ValueError(
                "`max_tokens` is not set, so there is no budget to pack for: give it to `PackingCollator`."
            )
        options: dict[str, Any] = {"strategy": self.strategy, "long_documents": self.long_documents, "seed": seed}
        if not is_stream(dataset):
            return PackedDataset(dataset, self.max_tokens, lengths=lengths, **options)
        if lengths is not None:
            raise ValueError(
                "`lengths` of a stream are not used, its documents are counted as they come: leave it out."
            )
        return PackedStream(
            dataset,
            self.max_tokens,
            buffer_size=self.buffer_size,
            group_size=group_size,
            linear_tokens=linear_tokens,
            **options,
        )

    def __call__(self, rows: Sequence[Mapping | PackedRow]) -> dict[str, object]:
        parts: list[DocumentColumns] = []
        loose, num_loose = 0, 0
        for number, row in enumerate(rows):
            if isinstance(row, PackedRow):
                inside = [read_document(document, f"document {i} of row {number}") for i, document in enumerate(row)]
                self._check_budget(sum(int(part.lengths.sum()) for part in inside), f"row {number} packs", len(row))
                parts += inside
            else:
                part = self._read_alone(row, number)
                loose, num_loose = loose + int(part.lengths.sum()), num_loose + 1
                parts.append(part)
        self._check_budget(loose, "the batch has", num_loose)
        if not parts:
            raise ValueError("the batch has no document: a row must hold at least one.")
        return self._flatten(parts)

    def _read_alone(self, row: Mapping, number: int) -> DocumentColumns:
        """A document that no one has packed, and so may be over the budget."""
        part = read_document(row, f"row {number}")
        num_tokens = int(part.lengths.sum())
        if self.max_tokens is None or num_tokens <= self.max_tokens or self.long_documents == "split":
            return part
        _rows, _starts, stops = cut_documents([num_tokens], self.max_tokens, self.long_documents, first_row=number)
        return read_document(cut_document(row, 0, int(stops[0])), f"row {number}")

    def _check_budget(self, num_tokens: int, what: str, documents: int) -> None:
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise ValueError(
                f"{what} {documents} documents of {num_tokens} tokens together, over `max_tokens` "
                f"({self.max_tokens}), and a collator cannot put documents back: `LongContextTrainer` counts tokens "
                "itself when `max_tokens` is set; in a loop use `PackedDataset` or `TokenBudgetSampler`."
            )

    def _starts(self, part: DocumentColumns) -> np.ndarray:
        """At which position each document begins."""
        first = self.position_ids_start
        if part.starts is None:
            return np.full(len(part.lengths), first)
        starts = np.where(part.starts == 0, first, part.starts)
        if first and np.any(starts != first):
            raise ValueError(
                f"a document's `position_ids` begin at {int(starts[starts != first][0])}, but `position_ids_start` is "
                f"{first}, from which all are counted: let them begin at 0 or {first}, or set `position_ids_start=0` "
                "and give every document its `position_ids`."
            )
        return starts

    def _flatten(self, parts: list[DocumentColumns]) -> dict[str, object]:
        lengths = np.concatenate([part.lengths for part in parts])
        shared = set.intersection(*(set(part.columns) for part in parts))
        names = [name for name in parts[0].columns if name in shared]
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        starts = np.concatenate([self._starts(part) for part in parts])
        lengths, starts = _latest_first(lengths, starts, columns)
        padding = -int(lengths.sum()) % (self.pad_to_multiple_of or 1)
        if padding:
            lengths, starts = np.append(lengths, padding), np.append(starts, self.position_ids_start)
            fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
            for name, column in columns.items():
                columns[name] = np.pad(column, (0, padding), constant_values=fill.get(name, 0))
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        if self.mask_first_label:
            columns["labels"][bounds[:-1]] = IGNORE_INDEX
        documents = np.repeat(np.arange(len(lengths)), lengths)
        columns["position_ids"] = np.arange(bounds[-1]) - bounds[documents] + starts[documents]
        batch: dict[str, object] = {name: torch.from_numpy(column)[None] for name, column in columns.items()}
        batch["seq_idx"] = torch.from_numpy(documents.astype(np.int32))[None]
        cu_seq_lens = torch.from_numpy(bounds.astype(np.int32))
        longest = int(lengths.max())
        return batch | {
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _latest_first(lengths: np.ndarray, starts: np.ndarray, columns: dict[str, np.ndarray]) -> tuple:
    """The documents of a row in an order in which positions never go on by one from one document into the next.

    Kernels that read documents from positions would take two such neighbours for one. Those that begin later stand
    first; documents that begin alike stay as they are. `columns` are changed in place.
    """
    order = np.argsort(-starts, kind="stable")
    if np.array_equal(order, np.arange(len(order))):
        return lengths, starts
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    index = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in order])
    for name, column in columns.items():
        columns[name] = column[index]
    return lengths[order], starts[order]


def fills_rows(collator: object) -> bool:
    """Whether `collator` asks for rows of a token budget."""
    return isinstance(collator, PackingCollator) and collator.max_tokens is not None

"""Flatten documents into one row without padding, and say where each begins.

What: `PackingCollator` turns a batch of documents into tensors of shape `(1, T)` with positions that restart and the
bounds that the kernels read (`cu_seq_lens_*`, `seq_idx`). It makes what transformers' `DataCollatorWithFlattening`
and TRL's padding-free collator make, also from rows that are packed already, and checks its input: a row that is
padded, empty or too long raises, with its number. Price: one copy of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ...parallel.shard import IGNORE_INDEX
from ..streams import is_stream
from .datasets import PackedDataset, PackedRow, PackedStream, cut_document, validate_buffer_size
from .lengths import cut_documents, validate_long_documents, validate_max_tokens, validate_strategy


if TYPE_CHECKING:
    from torch.utils.data import Dataset, IterableDataset

# Columns of TRL that say which tokens are trained (1) where there are no labels.
TRAINED_TOKEN_MASKS = ("completion_mask", "assistant_masks")
# Columns that are read and that no model takes, so that a trainer would drop them.
READ_COLUMNS = ("seq_lengths", "seq_idx", *TRAINED_TOKEN_MASKS)
# Columns that are read, made here or dropped, and so are not carried over.
_OWN_KEYS = {"input_ids", "labels", "attention_mask", "position_ids", "seq_lengths", "seq_idx", *TRAINED_TOKEN_MASKS}


class _Tokens(NamedTuple):
    """One document, or several that TRL packed: its columns and the lengths of the documents inside."""

    lengths: np.ndarray
    columns: dict[str, np.ndarray]


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
            Position of the first token of each document. RoBERTa and similar models use `pad_token_id + 1`, 2.
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
        ValueError: an empty or padded row, columns of different lengths, positions that skip within a document, or
            more than `max_tokens` tokens.
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
        parts: list[_Tokens] = []
        loose, num_loose = 0, 0
        for number, row in enumerate(rows):
            if isinstance(row, PackedRow):
                inside = [_read(document, f"document {i} of row {number}") for i, document in enumerate(row)]
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

    def _read_alone(self, row: Mapping, number: int) -> _Tokens:
        """A document that no one has packed, and so may be over the budget."""
        part = _read(row, f"row {number}")
        num_tokens = int(part.lengths.sum())
        if self.max_tokens is None or num_tokens <= self.max_tokens or self.long_documents == "split":
            return part
        _rows, _starts, stops = cut_documents([num_tokens], self.max_tokens, self.long_documents, first_row=number)
        return _read(cut_document(row, 0, int(stops[0])), f"row {number}")

    def _check_budget(self, num_tokens: int, what: str, documents: int) -> None:
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise ValueError(
                f"{what} {documents} documents of {num_tokens} tokens together, over `max_tokens` "
                f"({self.max_tokens}), and a collator cannot put documents back: `LongContextTrainer` counts tokens "
                "itself when `max_tokens` is set; in a loop use `PackedDataset` or `TokenBudgetSampler`."
            )

    def _flatten(self, parts: list[_Tokens]) -> dict[str, object]:
        lengths = np.concatenate([part.lengths for part in parts])
        shared = set.intersection(*(set(part.columns) for part in parts))
        names = [name for name in parts[0].columns if name in shared]
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        padding = -int(lengths.sum()) % (self.pad_to_multiple_of or 1)
        if padding:
            lengths = np.append(lengths, padding)
            fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
            for name, column in columns.items():
                columns[name] = np.pad(column, (0, padding), constant_values=fill.get(name, 0))
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        if self.mask_first_label:
            columns["labels"][bounds[:-1]] = IGNORE_INDEX
        documents = np.repeat(np.arange(len(lengths)), lengths)
        columns["position_ids"] = np.arange(bounds[-1]) - bounds[documents] + self.position_ids_start
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


def _read(document: Mapping, name: str) -> _Tokens:
    """The columns of one document as arrays, checked against one another."""
    if not isinstance(document, Mapping) or "input_ids" not in document:
        known = isinstance(document, Mapping)
        found = f"only {', '.join(document)}" if known else f"but is a `{type(document).__name__}`"
        raise ValueError(f"{name} has no `input_ids`, {found}: give tokenized documents.")
    ids = np.asarray(document["input_ids"])
    if not ids.size:
        raise ValueError(f"{name} has no tokens, but every document needs at least one: filter the empty ones out.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"`input_ids` of {name} has shape {ids.shape} and type {ids.dtype}, but a document is a flat list of "
            "whole numbers: drop the batch dimension."
        )
    if document.get("attention_mask") is not None and not np.all(document["attention_mask"]):
        raise ValueError(
            f"the `attention_mask` of {name} has zeros, so it is padded, and packed rows have no padding: tokenize "
            "with `padding=False`."
        )
    columns = {"input_ids": ids.astype(np.int64), "labels": _labels(document, ids, name)}
    for key, value in document.items():
        if key not in _OWN_KEYS and (column := _numbers(value, len(ids))) is not None:
            columns[key] = column
    lengths = _inner_lengths(document, len(ids), name)
    if document.get("position_ids") is not None:
        _check_positions(_column(document, "position_ids", len(ids), name), lengths, name)
    return _Tokens(lengths, columns)


def _check_positions(positions: np.ndarray, lengths: np.ndarray, name: str) -> None:
    """Refuse positions that mean something; a part of a longer document may begin anywhere."""
    is_first = np.zeros(len(positions), dtype=bool)
    is_first[np.cumsum(lengths[:-1])] = True
    if not np.all((np.diff(positions) == 1) | is_first[1:]):
        raise ValueError(
            f"`position_ids` of {name} do not go up by one within each document, and packing counts them anew: drop "
            "the column if that is meant; `seq_lengths` tells where documents begin."
        )


def _labels(document: Mapping, ids: np.ndarray, name: str) -> np.ndarray:
    if document.get("labels") is not None:
        return _column(document, "labels", len(ids), name).astype(np.int64)
    labels = ids.astype(np.int64)
    for key in TRAINED_TOKEN_MASKS:
        if document.get(key) is not None:
            labels = np.where(_column(document, key, len(ids), name), labels, IGNORE_INDEX)
    return labels


def _column(document: Mapping, key: str, num_tokens: int, name: str) -> np.ndarray:
    column = np.asarray(document[key])
    if column.shape != (num_tokens,):
        raise ValueError(
            f"`{key}` of {name} has shape {column.shape}, but its `input_ids` have {num_tokens} tokens: give one "
            "entry a token."
        )
    return column


def _inner_lengths(document: Mapping, num_tokens: int, name: str) -> np.ndarray:
    if document.get("seq_lengths") is None:
        if document.get("seq_idx") is None:
            return np.array([num_tokens])
        index = _column(document, "seq_idx", num_tokens, name)
        return np.diff(np.flatnonzero(np.diff(index, prepend=index[0] - 1, append=index[-1] + 1)))
    lengths = np.asarray(document["seq_lengths"], dtype=np.int64)
    if lengths.sum() != num_tokens or (lengths < 1).any():
        raise ValueError(
            f"`seq_lengths` of {name} ({lengths.tolist()[:8]}) sum to {lengths.sum()}, but must be positive and sum "
            f"to its {num_tokens} `input_ids`: the row was cut or filled after it was packed, so pack it again."
        )
    return lengths


def _numbers(value: object, num_tokens: int) -> np.ndarray | None:
    """`value` as an array where it holds one number a token."""
    if isinstance(value, (list, tuple)):
        if len(value) != num_tokens or not isinstance(value[0], (bool, int, float)):
            return None
    elif not isinstance(value, (torch.Tensor, np.ndarray)):
        return None
    array = np.asarray(value)
    if array.shape != (num_tokens,) or array.dtype.kind not in "biuf":
        return None
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


def fills_rows(collator: object) -> bool:
    """Whether `collator` asks for rows of a token budget."""
    return isinstance(collator, PackingCollator) and collator.max_tokens is not None

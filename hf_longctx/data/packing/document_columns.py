"""One document as arrays: its tokens, labels, other columns and positions, checked against one another.

What a packed row is flattened from. A document that is padded, empty, or whose columns disagree raises, by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ...parallel.shard import IGNORE_INDEX


# Columns of TRL that say which tokens are trained (1) where there are no labels.
TRAINED_TOKEN_MASKS = ("completion_mask", "assistant_masks")
# Columns that are read and that no model takes, so that a trainer would drop them.
READ_COLUMNS = ("seq_lengths", "seq_idx", *TRAINED_TOKEN_MASKS)
# Columns that are read, made here or dropped, and so are not carried over.
_OWN_KEYS = {"input_ids", "labels", "attention_mask", "position_ids", "seq_lengths", "seq_idx", *TRAINED_TOKEN_MASKS}


class DocumentColumns(NamedTuple):
    """One document, or several that TRL packed: its columns, the lengths of the documents inside, and at which
    positions those begin where the row says so."""

    lengths: np.ndarray
    columns: dict[str, np.ndarray]
    starts: np.ndarray | None = None


def read_document(document: Mapping, name: str) -> DocumentColumns:
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
    if document.get("position_ids") is None:
        return DocumentColumns(lengths, columns)
    positions = _whole_numbers(_column(document, "position_ids", len(ids), name), "position_ids", name)
    return DocumentColumns(lengths, columns, _starts_of(positions, lengths, name))


def _starts_of(positions: np.ndarray, lengths: np.ndarray, name: str) -> np.ndarray:
    """Where each document begins: a part of a longer one may begin anywhere, but each counts by one."""
    is_first = np.zeros(len(positions), dtype=bool)
    is_first[np.cumsum(lengths) - lengths] = True
    if not np.all((np.diff(positions) == 1) | is_first[1:]):
        raise ValueError(
            f"`position_ids` of {name} do not go up by one within each document, which packing cannot keep: drop "
            "the column to count anew; `seq_lengths` tells where documents begin."
        )
    starts = positions[is_first]
    if starts.min() < 0:
        raise ValueError(
            f"`position_ids` of {name} begin at {starts.min()}, but no position is below 0: count from 0, or drop the "
            "column."
        )
    return starts


def _whole_numbers(column: np.ndarray, key: str, name: str) -> np.ndarray:
    """`column` as integers, which floats may hold too."""
    if column.dtype.kind not in "iuf" or (column.dtype.kind == "f" and not np.all(column == np.round(column))):
        raise ValueError(
            f"`{key}` of {name} have type {column.dtype} and values such as {column[:3].tolist()}, but they must be "
            "whole numbers, one a token."
        )
    return column.astype(np.int64)


def _labels(document: Mapping, ids: np.ndarray, name: str) -> np.ndarray:
    if document.get("labels") is not None:
        return _whole_numbers(_column(document, "labels", len(ids), name), "labels", name)
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

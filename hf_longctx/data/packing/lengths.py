"""Lengths to bins: which documents share a row of at most `max_tokens` tokens, and in which order the rows come.

What: `pack_lengths` puts every token of every document into exactly one bin, so rows need no padding.
`balanced_order` then puts rows of similar cost next to each other, because the ranks of one step wait for the slowest.
Numbers only: no tokens, no torch. Price: one to two seconds for a million documents on one core (`placing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .bins import place_best_fit, place_first_fit, place_in_order


STRATEGIES = ("in_order", "first_fit_decreasing", "best_fit_decreasing")
LONG_DOCUMENTS = ("error", "split", "truncate")


class Piece(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of the document in row `row` of the data set."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Packing:
    """Which pieces share a bin. `len()` counts bins; `packing[i]` lists the [`Piece`]s of bin `i`.

    Args:
        rows (`np.ndarray`): row of the data set of every piece, bin after bin.
        starts (`np.ndarray`): first token of every piece.
        stops (`np.ndarray`): token after the last one of every piece.
        bin_offsets (`np.ndarray`): bin `i` holds the pieces `bin_offsets[i]` to `bin_offsets[i + 1]`.
        max_tokens (`int`): the budget of a bin, in tokens.
    """

    rows: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    bin_offsets: np.ndarray
    max_tokens: int

    def __len__(self) -> int:
        return len(self.bin_offsets) - 1

    def __getitem__(self, index: int) -> list[Piece]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"bin {index} of {len(self)}")
        first, last = self.bin_offsets[index % len(self)], self.bin_offsets[index % len(self) + 1]
        fields = (array[first:last].tolist() for array in (self.rows, self.starts, self.stops))
        return [Piece(*piece) for piece in zip(*fields)]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every piece."""
        return self.stops - self.starts

    @property
    def bin_tokens(self) -> np.ndarray:
        """Tokens of every bin."""
        return np.add.reduceat(self.lengths, self.bin_offsets[:-1])

    @property
    def efficiency(self) -> float:
        """Share of the budget of all bins that holds tokens, at most 1."""
        return float(self.lengths.sum() / (len(self) * self.max_tokens))

    def costs(self, linear_tokens: float) -> np.ndarray:
        """What every bin costs to compute; see [`packing_cost`]."""
        return np.add.reduceat(_cost_of_each(self.lengths, linear_tokens), self.bin_offsets[:-1])


def pack_lengths(
    lengths: Sequence[int] | np.ndarray,
    max_tokens: int,
    *,
    strategy: str = "best_fit_decreasing",
    long_documents: str = "error",
    seed: int | None = None,
) -> Packing:
    """Put documents into bins of at most `max_tokens` tokens, each token into exactly one.

    Args:
        lengths (`Sequence[int]`): tokens of every document.
        max_tokens (`int`): the budget of a bin, in tokens.
        strategy (`str`, *optional*, defaults to `"best_fit_decreasing"`):
            `"best_fit_decreasing"`: longest document first, each into the fullest bin that has room.
            `"first_fit_decreasing"`: longest first, each into the first bin that has room.
            `"in_order"`: the documents as they come; a bin is closed when the next document does not fit.
        long_documents (`str`, *optional*, defaults to `"error"`):
            For a document over the budget. `"split"`: consecutive pieces of at most `max_tokens` tokens, each a
            document of its own from then on. `"truncate"`: the first `max_tokens` tokens, the rest is left out.
        seed (`int`, *optional*):
            Documents of equal length are visited in an order drawn from it, in the order of rows without it.
            `"in_order"` has no use for it.

    Returns:
        [`Packing`]: the bins; the same arguments give the same bins.

    Raises:
        ValueError: no documents, an empty document, one over the budget with `"error"`, or a setting out of range.

    Source: Fewer Truncations Improve Language Modeling, https://huggingface.co/papers/2404.10830, section 3, for best
    fit over distinct capacities; placing equal lengths together gives the same bins.
    """
    validate_strategy(strategy)
    lengths = _as_lengths(lengths)
    if not len(lengths):
        raise ValueError(
            "`lengths` is empty, so there is no document to pack: check what the data set was filtered by."
        )
    rows, starts, stops = cut_documents(lengths, max_tokens, long_documents)
    sizes, max_tokens = stops - starts, int(max_tokens)
    if strategy == "in_order":
        visited, bins = np.arange(len(sizes)), place_in_order(sizes, max_tokens)
    else:
        visited = np.arange(len(sizes)) if seed is None else np.random.default_rng(seed).permutation(len(sizes))
        visited = visited[np.argsort(-sizes[visited], kind="stable")]
        place = place_best_fit if strategy == "best_fit_decreasing" else place_first_fit
        bins = place(sizes[visited], max_tokens)
    visited = visited[np.argsort(bins, kind="stable")]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(bins))))
    return Packing(rows[visited], starts[visited], stops[visited], offsets, max_tokens)


def cut_documents(
    lengths: Sequence[int] | np.ndarray, max_tokens: int, long_documents: str = "error", *, first_row: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most `max_tokens` tokens, in the order of rows and tokens.

    Args:
        first_row (`int`, *optional*, defaults to 0): number of the first row in error messages.
        See [`pack_lengths`] for the others.

    Returns:
        tuple of three arrays: row (from 0), start and stop of every piece.

    Raises:
        ValueError: see [`pack_lengths`].
    """
    lengths = _as_lengths(lengths)
    validate_max_tokens(max_tokens)
    validate_long_documents(long_documents)
    empty = np.flatnonzero(lengths < 1)
    if len(empty):
        raise ValueError(
            f"{_rows_in_words(empty, first_row)} has {lengths[empty[0]]} tokens, but every document needs at least "
            "one: filter the empty ones out before packing."
        )
    rows = np.arange(len(lengths))
    long = np.flatnonzero(lengths > max_tokens)
    if len(long) and long_documents == "error":
        raise ValueError(
            f"{_rows_in_words(long, first_row)} has {lengths[long[0]]} tokens, over `max_tokens` ({max_tokens}): set "
            "`long_documents` to 'split' or 'truncate', or raise `max_tokens`."
        )
    if not len(long) or long_documents == "truncate":
        return rows, np.zeros_like(lengths), np.minimum(lengths, max_tokens)
    pieces = -(-lengths // max_tokens)
    rows = np.repeat(rows, pieces)
    starts = (np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_tokens
    return rows, starts, np.minimum(starts + max_tokens, lengths[rows])


def packing_cost(lengths: Sequence[int] | np.ndarray, linear_tokens: float) -> float:
    """What documents cost to compute, whatever rows they share: `sum(L^2 + linear_tokens * L)`.

    One layer of width `D` spends `24 D^2` operations a token on its matrices (about `12 D^2` weights, two operations
    each) and `4 D` on a pair of query and key; causal attention sees `L / 2` keys in the mean, so `2 L D` a token.
    Both are equal at `L = 12 D`, which is `linear_tokens`: the document length at which attention costs as much as
    everything else. In units of `2 D` a document then costs `L^2 + 12 D L`, forward and backward alike. Windows,
    grouped heads, experts and a large vocabulary shift the balance; the order of rows only needs it roughly.

    Args:
        lengths (`Sequence[int]`): tokens of every document.
        linear_tokens (`float`): about 12 times the hidden size of the model.
    """
    return float(_cost_of_each(np.asarray(lengths), linear_tokens).sum())


def balanced_order(
    costs: Sequence[float] | np.ndarray, group_size: int, *, seed: int, epoch: int | tuple = 0, window: int = 32
) -> np.ndarray:
    """A random order of all bins in which every `group_size` consecutive ones cost nearly the same.

    The bins are shuffled, then sorted by cost within windows of about `window` groups, cut into groups, and the groups
    of a window and the bins of a group are shuffled again. Small windows stay close to a plain shuffle, large ones
    balance better. Bins that fill no group come last.

    Args:
        costs (`Sequence[float]`): cost of every bin, as from [`Packing.costs`].
        group_size (`int`): bins of one step, one a data-parallel rank. With 1 the order is a plain shuffle.
        seed (`int`): of the run.
        epoch (`int` or `tuple` of them, *optional*, defaults to 0): every epoch has an order of its own.
        window (`int`, *optional*, defaults to 32): groups that are sorted together.

    Returns:
        `np.ndarray`: every number from 0 to `len(costs) - 1`, once.

    Raises:
        ValueError: `group_size` or `window` is below 1.
    """
    for name, value in (("group_size", group_size), ("window", window)):
        if value < 1:
            raise ValueError(f"`{name}` ({value}) must be at least 1.")
    costs = np.asarray(costs, dtype=np.float64)
    rng = np.random.default_rng((seed, *epoch) if isinstance(epoch, tuple) else (seed, epoch))
    order = rng.permutation(len(costs))
    groups = len(order) // group_size
    if group_size == 1 or not groups:
        return order
    rest = order[groups * group_size :]
    pieces = []
    # Windows of nearly equal size: a last one of a single group would hold rows of any cost.
    for chunk in np.array_split(order[: groups * group_size].reshape(groups, group_size), -(-groups // window)):
        bins = chunk.ravel()
        chunk = bins[np.argsort(costs[bins], kind="stable")].reshape(-1, group_size)
        pieces.append(rng.permuted(rng.permutation(chunk), axis=1).ravel())
    return np.concatenate([*pieces, rest])


def validate_strategy(strategy: str) -> None:
    """Raise `ValueError` unless `strategy` is one of `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` ({strategy!r}) must be one of {', '.join(map(repr, STRATEGIES))}.")


def validate_long_documents(long_documents: str) -> None:
    """Raise `ValueError` unless `long_documents` is one of `LONG_DOCUMENTS`."""
    if long_documents not in LONG_DOCUMENTS:
        raise ValueError(
            f"`long_documents` ({long_documents!r}) must be one of {', '.join(map(repr, LONG_DOCUMENTS))}."
        )


def validate_max_tokens(max_tokens: int) -> None:
    """Raise `ValueError` unless `max_tokens` is a whole number of at least 1."""
    whole = isinstance(max_tokens, (int, np.integer)) and not isinstance(max_tokens, bool)
    if not whole or max_tokens < 1:
        raise ValueError(f"`max_tokens` ({max_tokens!r}) must be a whole number of at least 1: the tokens of one row.")


def _as_lengths(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"`lengths` has shape {array.shape} and type {array.dtype}, but it must be a flat list of whole numbers: "
            "the tokens of every document."
        )
    return array.astype(np.int64)


def _rows_in_words(rows: np.ndarray, first_row: int) -> str:
    others = f" (like {len(rows) - 1} more)" if len(rows) > 1 else ""
    return f"row {first_row + rows[0]}{others}"


def _cost_of_each(lengths: np.ndarray, linear_tokens: float) -> np.ndarray:
    lengths = lengths.astype(np.float64)
    return lengths * (lengths + linear_tokens)

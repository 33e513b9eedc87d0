"""Which sources make global batch `i`: a plan that every rank computes without communication.

What: with in-batch negatives a model should tell apart texts of one source; between sources it would learn to tell
the sources. So one source, or `sources_per_batch` of them, is drawn for the batch of all ranks. Sources are drawn by
weight, by temperature or by their rows. Why not by epochs: with weights, a source is read five times while another is
read once, so draws are infinite and every source counts its own passes. How: draw `i` is a function of
`(seed, i)`. Price: a few numbers a draw; where draw `n` stands is known without a single row being read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import read_json
from .shuffled import number_of


BLOCK = 1024  # draws whose random numbers are made together


class Source(NamedTuple):
    """Rows and weight of a source, as a `data_config.json` tells them."""

    rows: int
    weight: float


@dataclass(frozen=True)
class Draw:
    """What makes one global batch.

    Args:
        shares (`dict[str, int]`): source to how many of the `sources_per_batch` equal shares it fills.
        swapped (`bool`): whether the two texts of every pair are swapped.
    """

    shares: dict[str, int]
    swapped: bool


class SourcePlan:
    """Which sources make which global batch.

    Args:
        rows (`Mapping[str, int | None]`): rows of every source that are used; `None` for a stream.
        weights (`Mapping[str, float]`, *optional*):
            How often every source is drawn, relative to the others. Unset: as often as it has rows.
        temperature (`float`, *optional*):
            Draw a source of `n` rows as often as `n ** (1 / temperature)`: 1 is by rows, more is more even.
        sources_per_batch (`int`, *optional*, defaults to 1):
            Equal shares of a batch, each of one source. A source is expected in exactly `sources_per_batch` times its
            probability shares; one with more than `1 / sources_per_batch` fills several of a batch.
        swap_probability (`float`, *optional*, defaults to 0.0):
            How often the two texts of the pairs are swapped: in all rows of a global batch or in none, so that a
            column never mixes questions with answers.
        seed (`int`, *optional*, defaults to 0): the same on all ranks.

    Raises:
        ValueError: no source, an empty one, a weight without a source or the other way round, or a stream without
            weights.
    """

    def __init__(
        self,
        rows: Mapping[str, int | None],
        *,
        weights: Mapping[str, float] | None = None,
        temperature: float | None = None,
        sources_per_batch: int = 1,
        swap_probability: float = 0.0,
        seed: int = 0,
    ) -> None:
        validate_sources(rows)
        self.names = tuple(rows)
        self.sources_per_batch, self.swap_probability, self.seed = sources_per_batch, swap_probability, seed
        weighed = _weigh(rows, weights, temperature)
        self.probabilities = {name: weight / sum(weighed) for name, weight in zip(self.names, weighed)}
        self._upto = np.cumsum(list(self.probabilities.values()))
        self._block = (-1, np.empty(0), np.empty(0))

    def draw(self, index: int) -> Draw:
        """What makes global batch `index`."""
        picked, swapped = self._draws_of_block(index // BLOCK)
        shares: dict[str, int] = {}
        for source in picked[index % BLOCK].tolist():
            shares[self.names[source]] = shares.get(self.names[source], 0) + 1
        return Draw(shares, bool(swapped[index % BLOCK]))

    def shares_before(self, index: int) -> dict[str, np.ndarray]:
        """The shares of every source in the draws before `index` that had it, in their order."""
        found: list[list[np.ndarray]] = [[] for _ in self.names]
        for block in range(math.ceil(index / BLOCK)):
            picked = self._draws_of_block(block)[0][: index - block * BLOCK]
            counts = np.zeros((len(picked), len(self.names)), dtype=np.int32)
            np.add.at(counts, (np.arange(len(picked))[:, None], picked), 1)
            for source in np.unique(picked):
                column = counts[:, source]
                found[source].append(column[column > 0])
        empty = np.zeros(0, dtype=np.int32)
        return {name: np.concatenate([empty, *pieces]) for name, pieces in zip(self.names, found)}

    def most_shares(self, name: str) -> int:
        """The most shares of one batch that the source can fill."""
        return max(1, math.ceil(self.probabilities[name] * self.sources_per_batch - 1e-9))

    def _draws_of_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the sources `[BLOCK, sources_per_batch]` and whether pairs are swapped `[BLOCK]`."""
        if self._block[0] == block:
            return self._block[1:]
        rng, shares = np.random.default_rng(number_of("draws", self.seed, block)), self.sources_per_batch
        swapped = rng.random(BLOCK) < self.swap_probability
        # Systematic sampling: points at equal distances fall into intervals as long as the probabilities, laid out in
        # a new order each time. Drawing one after the other without replacement would favour rare sources.
        points = (rng.random(BLOCK)[:, None] + np.arange(shares)) / shares
        last = len(self.names) - 1
        if shares == 1:
            picked = np.searchsorted(self._upto, points[:, 0], side="right").clip(0, last)[:, None]
        else:
            picked, lengths = np.empty((BLOCK, shares), dtype=np.int64), np.array(list(self.probabilities.values()))
            for row in range(BLOCK):
                order = rng.permutation(last + 1)
                places = np.searchsorted(np.cumsum(lengths[order]), points[row], side="right").clip(0, last)
                picked[row] = order[places]
        self._block = (block, picked, swapped)
        return picked, swapped


def validate_sources(rows: Mapping[str, int | None]) -> None:
    """Raise `ValueError` unless there are sources and each has rows."""
    if not rows:
        raise ValueError("`datasets` has no source, so there is nothing to draw: give at least one name with rows.")
    for name, count in rows.items():
        if count is not None and count < 1:
            raise ValueError(
                f"source `{name}` has no rows: leave it out, or check what it was filtered by and its `source_caps`."
            )


def validate_names(field: str, given: Mapping[str, object] | None, names: tuple[str, ...]) -> None:
    """Raise `ValueError` unless every key of `given` is the name of a source."""
    for name in given or ():
        if name not in names:
            near = get_close_matches(name, names, n=1, cutoff=0)
            raise ValueError(
                f"`{field}` names the source `{name}`, which is none of the {len(names)} sources: "
                f"did you mean `{near[0]}`?"
            )


def load_source_weights(path: str | Path) -> dict[str, Source]:
    """Read the sources of a `data_config.json`, as shipped with `all-MiniLM-L6-v2`.

    Args:
        path (`str` or `Path`): a JSON list of `{"name": ..., "lines": ..., "weight": ...}`.

    Returns:
        `dict[str, Source]`: rows and weight by name, in the order of the file.

    Raises:
        ValueError: the file is something else, or names a source twice; the message names the place.
    """
    found: dict[str, Source] = {}
    entries = read_json(path, (list, dict))
    for place, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        try:
            name, source = str(entry["name"]), Source(int(entry["lines"]), float(entry["weight"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"entry {place} of `{path}` is no source: it must be an object with `name`, `lines` and `weight`."
            ) from error
        if name in found:
            raise ValueError(f"`{path}` names the source `{name}` twice: give every source one entry.")
        found[name] = source
    return found


def _weigh(
    rows: Mapping[str, int | None], weights: Mapping[str, float] | None, temperature: float | None
) -> list[float]:
    names = tuple(rows)
    if weights is not None:
        validate_names("source_weights", weights, names)
        for name in names:
            if name not in weights:
                raise ValueError(
                    f"`source_weights` has no weight for the source `{name}`: give it one, or leave the source out."
                )
        return [float(weights[name]) for name in names]
    if len(names) == 1:
        return [1.0]
    counts: list[float] = []
    for name, count in rows.items():
        if count is None:
            raise ValueError(
                f"source `{name}` is a stream of unknown length: say how often each source is drawn with "
                "`source_weights`."
            )
        counts.append(float(count))
    # As logarithms: a temperature near 0 would overflow.
    logs = np.log(counts) / (1.0 if temperature is None else temperature)
    return np.exp(logs - logs.max()).tolist()

"""The contrastive loss of my rows, a tile of scores at a time: what a tile is, and the ways to go over all of them.

With all candidates available (`strip_pass`), the tiles of some rows are kept as exponentials until the softmax of
these rows is known, so that every score is computed once, as with the whole matrix. When candidates come block by
block (`sum_pass`, then `gradient_pass`), scores are computed twice. Either way memory grows with the number of rows,
not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .contrastive_rules import POSITIVE, QUERY, Duplicates, Interaction


# Entries of the scores that are kept at a time, 64 MiB in fp32: of fewer rows if they have more candidates, though of
# no fewer than a matmul needs to be fast.
STRIP_ENTRIES = 2**24
MIN_STRIP_ROWS = 128


@dataclass(frozen=True)
class Block:
    """Candidates of some consecutive pairs, and where their gradients are summed.

    Args:
        start (`int`): the index of the first pair among those of all ranks.
        columns (`Sequence[torch.Tensor | None]`): `(n, D)` for each column; `None` for a column without candidates.
        gradients (`Sequence[torch.Tensor | None]`): of the same shapes; `None` where none is needed.
    """

    start: int
    columns: Sequence[Any]  # no interaction has a column that is `None`
    gradients: Sequence[torch.Tensor | None]


class RowTiles:
    """My rows against blocks of candidates.

    Args:
        rows (`Sequence[torch.Tensor]`): my queries and my positives, `(n, D)`, normalized if they shall be.
        gradients (`Sequence[torch.Tensor | None]`): where the gradients of `rows` are summed.
        start (`int`): the index of my first pair among those of all ranks.
        softmaxes (`list[list[Interaction]]`): of [`ContrastiveRule.softmaxes`].
        scale (`float`): what a score is multiplied by.
        tile_size (`int`): rows and candidates of a tile.
        duplicates ([`Duplicates`], *optional*): candidates that are no negatives.
        with_scale (`bool`): whether the gradient of the scale is needed.

    All gradients are those of `total()` divided by `scale`; `finish` adds the term of the positives.
    """

    def __init__(
        self,
        rows: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        start: int,
        softmaxes: list[list[Interaction]],
        *,
        scale: float,
        tile_size: int,
        duplicates: Duplicates | None,
        with_scale: bool,
    ) -> None:
        self.rows, self.gradients, self.start, self.softmaxes = rows, gradients, start, softmaxes
        self.scale, self.tile_size, self.duplicates, self.with_scale = scale, tile_size, duplicates, with_scale
        example, count = rows[QUERY], len(rows[QUERY])
        lowest = torch.finfo(example.dtype).min / 4  # finite, so that a row without a candidate so far is not NaN
        self.largest = [example.new_full((count,), lowest) for _ in softmaxes]
        self.sums = [example.new_zeros(count) for _ in softmaxes]
        self.positive = example.new_zeros(count)
        self.scale_gradient = example.new_zeros((), dtype=torch.float64)
        self._scaled = example.new_empty(min(tile_size, count), example.shape[1])
        self._product = torch.empty_like(self._scaled)

    def total(self) -> torch.Tensor:
        """The sum of the losses of my rows, in fp64."""
        logs = sum(self.log_sum(index, slice(None)).double().sum() for index in range(len(self.softmaxes)))
        return logs / len(self.softmaxes) - self.positive.double().sum()

    def log_sum(self, softmax: int, rows: slice) -> torch.Tensor:
        return self.largest[softmax][rows] + self.sums[softmax][rows].log()

    def sum_pass(self, block: Block) -> None:
        """Add the candidates of `block` to the softmaxes, without a gradient."""
        buffer = self._buffer(min(self.tile_size, len(self.positive)) * self.tile_size)
        for rows in _slices(len(self.positive), self.tile_size):
            for softmax, interactions in enumerate(self.softmaxes):
                for interaction, candidates in self._tiles(interactions, block):
                    tile = self._scores(interaction, rows, candidates, block, buffer)
                    self._absorb(tile, softmax, rows)

    def gradient_pass(self, block: Block) -> None:
        """Sum the gradients that `block` takes part in; the softmaxes must be complete."""
        buffer = self._buffer(min(self.tile_size, len(self.positive)) * self.tile_size)
        for rows in _slices(len(self.positive), self.tile_size):
            for softmax, interactions in enumerate(self.softmaxes):
                log_sum = self.log_sum(softmax, rows)
                share = torch.full_like(log_sum, 1 / len(self.softmaxes))
                for interaction, candidates in self._tiles(interactions, block):
                    tile = self._scores(interaction, rows, candidates, block, buffer)
                    tile.sub_(log_sum[:, None]).exp_()
                    self._differentiate(tile, share, interaction, rows, candidates, block)

    def strip_pass(self, block: Block) -> None:
        """`sum_pass` and `gradient_pass` at once, for the one block that holds all candidates."""
        widths = [sum(len(block.columns[i.column]) for i in interactions) for interactions in self.softmaxes]
        height = min(self.tile_size, max(MIN_STRIP_ROWS, STRIP_ENTRIES // max(widths)))
        buffer = self._buffer(min(height, len(self.positive)) * max(widths))
        for rows in _slices(len(self.positive), height):
            for softmax, interactions in enumerate(self.softmaxes):
                kept, used = [], 0
                for interaction, candidates in self._tiles(interactions, block):
                    tile = self._scores(interaction, rows, candidates, block, buffer[used:])
                    used += tile.numel()
                    # The tile is relative to the largest score so far; later tiles may find a larger one.
                    kept.append((interaction, candidates, tile, self._absorb(tile, softmax, rows)))
                log_sum = self.log_sum(softmax, rows)
                for interaction, candidates, tile, reference in kept:
                    share = (reference - log_sum).exp_().div_(len(self.softmaxes))
                    self._differentiate(tile, share, interaction, rows, candidates, block)

    def finish(self, own: Block, factor: float) -> torch.Tensor:
        """Add the term of the positives, once all candidates were seen.

        Args:
            own ([`Block`]): a block that holds my pairs.
            factor (`float`): what `total()` will be multiplied by.

        Returns:
            `torch.Tensor`: the gradient of `factor * total()` to the scale.
        """
        place = slice(self.start - own.start, self.start - own.start + len(self.positive))
        of_queries, of_positives = self.gradients[QUERY], own.gradients[POSITIVE]
        if of_queries is not None:
            of_queries.sub_(own.columns[POSITIVE][place])
        if of_positives is not None:
            of_positives[place].sub_(self.rows[QUERY])
        self.scale_gradient -= self.positive.double().sum() / self.scale
        return self.scale_gradient * factor

    def _buffer(self, entries: int) -> torch.Tensor:
        return self.positive.new_empty(entries)

    def _tiles(self, interactions: list[Interaction], block: Block) -> Iterator[tuple[Interaction, slice]]:
        for interaction in interactions:
            for candidates in _slices(len(block.columns[interaction.column]), self.tile_size):
                yield interaction, candidates

    def _scores(
        self, interaction: Interaction, rows: slice, candidates: slice, block: Block, buffer: torch.Tensor
    ) -> torch.Tensor:
        """The logits of one tile, `(rows, candidates)`, at the front of `buffer`."""
        x, y = self.rows[interaction.row][rows], block.columns[interaction.column][candidates]
        tile = buffer[: len(x) * len(y)].view(len(x), len(y))
        others = self.scale + interaction.others
        torch.mm(torch.mul(x, others, out=self._scaled[: len(x)]), y.t(), out=tile)
        row_places = slice(self.start + rows.start, self.start + rows.stop)
        candidate_places = slice(block.start + candidates.start, block.start + candidates.stop)
        duplicates = self.duplicates
        mask = None if duplicates is None else duplicates.mask(interaction.column, row_places, candidate_places)
        first = max(row_places.start, candidate_places.start)
        last = min(row_places.stop, candidate_places.stop)
        if first < last:  # the tile holds scores within a pair
            mine = slice(first - row_places.start, last - row_places.start)
            own = tile[mine, first - candidate_places.start : last - candidate_places.start].diagonal()
            if interaction.own is None:
                own.fill_(-torch.inf)
            else:
                own.mul_((self.scale + interaction.own) / others)
            if interaction.column == POSITIVE and interaction.row == QUERY:
                self.positive[rows][mine] = own
            if mask is not None and interaction.column <= POSITIVE:
                mask[mine, first - candidate_places.start : last - candidate_places.start].diagonal().fill_(False)
        if mask is not None:
            tile.masked_fill_(mask, -torch.inf)
        return tile

    def _absorb(self, tile: torch.Tensor, softmax: int, rows: slice) -> torch.Tensor:
        """Add a tile to the running sums; it becomes `exp(tile - reference)`, and the reference is returned."""
        before, sums = self.largest[softmax][rows], self.sums[softmax][rows]
        reference = torch.maximum(before, tile.amax(1))
        sums.mul_((before - reference).exp_()).add_(tile.sub_(reference[:, None]).exp_().sum(1))
        self.largest[softmax][rows] = reference
        return reference

    def _differentiate(
        self,
        tile: torch.Tensor,
        share: torch.Tensor,
        interaction: Interaction,
        rows: slice,
        candidates: slice,
        block: Block,
    ) -> None:
        """Sum what a tile of exponentials, each row times its `share`, gives to both sides."""
        x, y = self.rows[interaction.row][rows], block.columns[interaction.column][candidates]
        row_gradient, column_gradient = self.gradients[interaction.row], block.gradients[interaction.column]
        if row_gradient is not None or self.with_scale:
            product = torch.mm(tile, y, out=self._product[: len(x)]).mul_(share[:, None])
            if row_gradient is not None:
                row_gradient[rows].add_(product)
            if self.with_scale:
                self.scale_gradient += (product * x).sum(dtype=torch.float64)
        if column_gradient is not None:
            column_gradient[candidates].addmm_(tile.t(), torch.mul(x, share[:, None], out=self._scaled[: len(x)]))


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))

"""In-batch negatives without the matrix of all scores, over the rows of one rank or of all.

What: the loss of sentence-transformers' `MultipleNegativesRankingLoss` from embeddings, with all its options. Why: for
`N` pairs that loss holds several `N x N` matrices. How: scores exist a tile at a time, and the gradients are made in
the forward. Price: one backward only; with `negatives="ring"` every score is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..parallel.collectives import gather_integer_rows, gather_rows
from ..parallel.ring import pass_round
from .contrastive_rules import POSITIVE, QUERY, ContrastiveRule, Duplicates
from .contrastive_tiles import Block, RowTiles
from .tiles import sum_with_gradient, wide_dtype, without_autocast


EPSILON = 1e-12  # torch's `normalize` divides by no less
COLUMN_NAMES = ("queries", "positives")


def contrastive_loss(
    columns: Sequence[torch.Tensor],
    *,
    scale: float | torch.Tensor = 20.0,
    rule: ContrastiveRule | None = None,
    normalize: bool = True,
    hashes: Sequence[torch.Tensor] | None = None,
    tile_size: int = 1024,
    group: dist.ProcessGroup | None = None,
    negatives: str = "gather",
    refuse_nonfinite: bool = True,
) -> torch.Tensor:
    """InfoNCE of queries, their positives and any number of hard negatives, with those of all ranks as negatives.

    Args:
        columns (`Sequence[torch.Tensor]`): queries, positives and hard negatives, each `(n, D)`, my rows.
        scale (`float` or `torch.Tensor`, *optional*, defaults to 20.0): what scores are multiplied by.
        rule ([`ContrastiveRule`], *optional*): directions, softmaxes and hardness; queries to documents if left out.
        normalize (`bool`, *optional*, defaults to `True`): scores are cosines; otherwise dot products.
        hashes (`Sequence[torch.Tensor]`, *optional*):
            of every column, `(n,)` in int64, equal for equal texts. Candidates that are no negatives are then left
            out: see [`Duplicates`].
        tile_size (`int`, *optional*, defaults to 1024): rows and candidates whose scores exist at a time.
        group (`ProcessGroup`, *optional*): the `dp` axis; `n` may differ between its ranks.
        negatives (`str`, *optional*, defaults to `"gather"`):
            `"gather"`: every rank holds the embeddings of all. `"ring"`: they go round block by block; every rank's
            upstream gradient must then be the same.
        refuse_nonfinite (`bool`, *optional*, defaults to `True`):
            Raise for embeddings that are not finite, with their rows; otherwise the loss is not finite either.

    Returns:
        `torch.Tensor`: a scalar in fp32, or fp64 for fp64.

    Raises:
        ValueError: on all ranks, for too few columns, different numbers of rows or columns, or values not finite.

    Relations: equals `MultipleNegativesRankingLoss` on one process, where `hashes` find nothing to leave out.
    Normalization: `ranks * (sum over my rows) / (rows of all ranks)`, so the mean over ranks is the mean over rows.
    Communication: two small all-gathers of integers (one without `hashes`); with `"gather"` one all-gather, and one
        reduce-scatter in the backward; with `"ring"` `3P - 1` messages between neighbours in the forward.
    Gradient: to every column and to `scale`; those of all ranks are summed, none is scaled.
    Memory: `O(n D)` for my rows and `O(N D)` for the candidates (`O(n D)` with `"ring"`), `tile_size * N` scores.
    Source: Inf-CL, https://huggingface.co/papers/2410.17243, for tiles and ring.
    """
    rule, counts = rule or ContrastiveRule(), agree_on_rows(columns, group, refuse_nonfinite)
    if hashes is not None:
        hashes = _gather_hashes(torch.stack(list(hashes)), counts, group)
    with without_autocast(columns[0].device):
        columns = [_prepare(column, normalize) for column in columns]
        scale = torch.as_tensor(scale, dtype=columns[0].dtype, device=columns[0].device)
        run = _Run(rule, tile_size, counts, 0 if group is None else dist.get_rank(group), hashes)
        if group is not None and negatives == "ring":
            return sum_with_gradient(lambda tensors, needs: _ring(run, group, tensors, needs), scale, *columns)
        shared = slice(QUERY if rule.needs_queries else POSITIVE, None)
        columns[shared] = gather_rows(columns[shared], counts, group)
        return sum_with_gradient(lambda tensors, needs: _at_once(run, tensors, needs), scale, *columns)


def agree_on_rows(
    columns: Sequence[torch.Tensor], group: dist.ProcessGroup | None, refuse_nonfinite: bool = True
) -> list[int]:
    """The number of rows of every rank, once all of them know that all columns of all ranks can be compared.

    Raises `ValueError` on every rank for what is wrong on any. Communication: one all-gather of 40 bytes.
    """
    device = columns[0].device if columns else "cpu"
    lengths = [len(column) for column in columns]
    bad_column, bad_row, bad_count = -1, -1, 0
    for index, column in enumerate(columns):
        if refuse_nonfinite and bad_column < 0 and not column.isfinite().all():
            rows = (~column.isfinite().all(1)).nonzero()
            bad_column, bad_row, bad_count = index, int(rows[0]), len(rows)
    unequal = next((i for i, length in enumerate(lengths) if length != lengths[0]), 0)
    mine = [len(columns), lengths[0] if lengths else 0, lengths[unequal] if lengths else 0, unequal]
    mine += [bad_column, bad_row, bad_count]
    everyone = gather_integer_rows(torch.tensor(mine, device=device), group).tolist()
    for rank, (width, rows, other_rows, other, bad_column, bad_row, bad_count) in enumerate(everyone):
        on = f" on data-parallel rank {rank}" if len(everyone) > 1 else ""
        if width < 2:
            raise ValueError(
                f"a contrastive loss got {width} column(s){on}, but it compares at least 2: pass queries, their "
                "positives and, as further columns, hard negatives."
            )
        if width != everyone[0][0]:
            raise ValueError(
                f"a contrastive loss got {everyone[0][0]} columns on data-parallel rank 0 but {width}{on}: all ranks "
                "must draw a step from one data set, or from data sets with as many columns."
            )
        if other_rows != rows:
            raise ValueError(
                f"column {other} has {other_rows} rows{on}, but column 0 has {rows}: row `i` of every column belongs "
                "to pair `i`, so all columns need the same number of rows."
            )
        if bad_column >= 0:
            name = COLUMN_NAMES[bad_column] if bad_column < 2 else "hard negatives"
            raise ValueError(
                f"the embeddings of column {bad_column} ({name}) are not finite in {bad_count} row(s){on}, the first "
                f"is row {bad_row}: look for it in the batch, and lower the learning rate or clip gradients if the "
                "weights themselves are not finite."
            )
    counts = [row[1] for row in everyone]
    if not sum(counts):
        raise ValueError("a contrastive loss got no rows: drop empty batches from the sampler.")
    return counts


class _Run:
    """What does not change over the blocks of one loss."""

    def __init__(self, rule, tile_size, counts, rank, hashes) -> None:
        self.rule, self.tile_size, self.counts, self.rank = rule, tile_size, counts, rank
        self.starts = [sum(counts[:r]) for r in range(len(counts))]
        self.start, self.local = self.starts[rank], counts[rank]
        self.factor = len(counts) / sum(counts)
        self.duplicates = None if hashes is None else Duplicates(hashes)

    def tiles(self, rows, gradients, scale, num_columns, with_scale) -> RowTiles:
        return RowTiles(
            rows,
            gradients,
            self.start,
            self.rule.softmaxes(num_columns),
            scale=float(scale),
            tile_size=self.tile_size,
            duplicates=self.duplicates,
            with_scale=with_scale,
        )

    def result(self, tiles: RowTiles) -> torch.Tensor:
        return (tiles.total() * self.factor).to(tiles.rows[QUERY].dtype)


def _at_once(run: _Run, tensors, needs):
    """All candidates are available, mine among them."""
    scale, *columns = tensors
    gradients = [torch.zeros_like(column) if need else None for column, need in zip(columns, needs[1:])]
    queries = slice(run.start, run.start + run.local) if run.rule.needs_queries else slice(None)
    mine = [queries, slice(run.start, run.start + run.local)]
    rows = [column[place] for column, place in zip(columns, mine)]
    row_gradients = [None if gradient is None else gradient[place] for gradient, place in zip(gradients, mine)]
    tiles = run.tiles(rows, row_gradients, scale, len(columns), needs[0])
    candidates = columns if run.rule.needs_queries else [None, *columns[1:]]
    block = Block(0, candidates, gradients)
    if not any(needs):
        tiles.sum_pass(block)
        return run.result(tiles), [None] * len(tensors)
    tiles.strip_pass(block)
    scale_gradient = tiles.finish(block, run.factor)
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(float(scale) * run.factor)
    return run.result(tiles), [scale_gradient.to(scale.dtype) if needs[0] else None, *gradients]


def _ring(run: _Run, group, tensors, needs):
    """Candidates come round block by block: once for the softmaxes, and once more with their gradients."""
    scale, *columns = tensors
    first = QUERY if run.rule.needs_queries else POSITIVE
    rows = columns[: POSITIVE + 1]
    row_gradients = [torch.zeros_like(row) if need else None for row, need in zip(rows, needs[1:])]
    tiles = run.tiles(rows, row_gradients, scale, len(columns), needs[0])
    mine = columns[0].new_zeros(2, len(columns) - first, max(run.counts), columns[0].shape[1])
    for slot, column in zip(mine[0], columns[first:]):
        slot[: run.local] = column

    def block_of(rank: int, values: torch.Tensor, gradients: torch.Tensor | None) -> Block:
        count, absent = run.counts[rank], [None] * first
        sums = [None] * len(values) if gradients is None else [slot[:count] for slot in gradients]
        return Block(run.starts[rank], [*absent, *(slot[:count] for slot in values)], [*absent, *sums])

    for rank, values in pass_round(mine[0], group):
        tiles.sum_pass(block_of(rank, values, None))
    if not any(needs):
        return run.result(tiles), [None] * len(tensors)
    for rank, (values, gradients) in pass_round(mine, group, changed=True):
        tiles.gradient_pass(block_of(rank, values, gradients))
    scale_gradient = tiles.finish(block_of(run.rank, *mine), run.factor)
    gradients = [None] * first + [slot[: run.local] for slot in mine[1]]
    for index, gradient in enumerate(row_gradients):
        if gradient is not None:
            gradients[index] = gradient if gradients[index] is None else gradients[index].add_(gradient)
    gradients = [g.mul_(float(scale) * run.factor) if need else None for g, need in zip(gradients, needs[1:])]
    return run.result(tiles), [scale_gradient.to(scale.dtype) if needs[0] else None, *gradients]


def _gather_hashes(hashes: torch.Tensor, counts: list[int], group: dist.ProcessGroup | None) -> torch.Tensor:
    """`(C, N)` from every rank's `(C, n)`."""
    padded = hashes.new_zeros(len(hashes), max(counts))
    padded[:, : hashes.shape[1]] = hashes
    parts = gather_integer_rows(padded, group)
    return torch.cat([part[:, :count] for part, count in zip(parts, counts)], dim=1)


def _prepare(column: torch.Tensor, normalize: bool) -> torch.Tensor:
    column = column.to(wide_dtype(column.dtype))
    return _Normalize.apply(column) if normalize else column


class _Normalize(torch.autograd.Function):
    """`torch.nn.functional.normalize` over rows, that keeps no more than its output and one number a row."""

    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        unit = x / norm.clamp_min(EPSILON)
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, norm = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, unit).unsqueeze(1).masked_fill_(norm < EPSILON, 0)
        return torch.addcmul(grad, unit, along, value=-1).div_(norm.clamp_min(EPSILON))

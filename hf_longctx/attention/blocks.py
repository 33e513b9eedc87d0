"""Attention over segments and windows as calls on small blocks, so that no `T x T` mask is ever made.

A row of segments (documents, chunks, padding) is cut where they start; a segment longer than a sliding window is cut
again into blocks of that window. A block then attends to itself, or to itself and its neighbours, and nothing else is
computed. Blocks of equal shape are stacked and go through the kernel in one call, so 64 documents of 512 tokens are
one call of 64 rows.

Price: one copy of the stacked blocks and of the output. With a window `w`, keys are copied twice (three times if it is
bidirectional) and each call's mask has `w x 2w` (`w x 3w`) entries, shared by all blocks and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..parallel.segments import PAD_SEGMENT
from .masks import AttentionRule


# Blocks of a shorter window would be many and small; a wider block only computes some scores that are then masked.
_SHORTEST_BLOCK = 128


@dataclass(frozen=True)
class BlockCall:
    """One call of the kernel on blocks of equal shape.

    Args:
        queries (`tuple` of `int`): the blocks that attend.
        keys (`tuple` of pairs of `int`): for each, the first block it sees and the one after the last.
        mask (`torch.Tensor`, *optional*): the kernel's mask for one block, `(1, 1, queries, keys)`; `None` if
            `is_causal` says it all.
        is_causal (`bool`): every token of a block sees those before it.
    """

    queries: tuple[int, ...]
    keys: tuple[tuple[int, int], ...]
    mask: torch.Tensor | None
    is_causal: bool


@dataclass(frozen=True)
class BlockPlan:
    """How rows are cut and which calls compute them.

    Args:
        lengths (`tuple` of `int`): tokens of each block; they cover the `B * T` flattened tokens.
        calls (`tuple` of [`BlockCall`]): each block is a query of one call at most. Blocks of padding are in none.
        numbers (`int`): entries a head of the largest mask that is made while a call runs, and not with the plan.
    """

    lengths: tuple[int, ...]
    calls: tuple[BlockCall, ...]
    numbers: int = 0


def plan_blocks(
    rule: AttentionRule, segments: torch.Tensor | None, rows: int, num_tokens: int, make_mask: Callable
) -> BlockPlan | None:
    """Cut rows under `rule` and `segments` into blocks and group them by shape.

    Args:
        rule ([`AttentionRule`]): without a chunk.
        segments (`torch.Tensor` of shape `(B, T)`, *optional*): tokens see their own segment only; -1 is padding.
        rows, num_tokens (`int`): `B` and `T`.
        make_mask (`Callable`): `(rule, queries, keys, offset) -> mask`: the kernel's mask for a block of `queries`
            tokens that starts `offset` tokens after the first of its `keys`, or `None` if the kernel needs none.

    Returns:
        [`BlockPlan`], or `None` if a segment is interrupted and so cannot be cut out.
    """
    runs = _runs(segments, rows, num_tokens)
    if runs is None:
        return None
    width = None if rule.window is None else max(rule.window, _SHORTEST_BLOCK)
    behind, ahead = (0, 0) if width is None else (1, 0) if rule.causal else (1, 1)
    lengths: list[int] = []
    groups: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for length, is_padding in runs:
        if is_padding:
            lengths.append(length)
            continue
        sizes = [length] if width is None else [*[width] * (length // width), *filter(None, [length % width])]
        first = len(lengths)
        lengths += sizes
        for index, size in enumerate(sizes):
            low, high = max(index - behind, 0), min(index + ahead + 1, len(sizes))
            shape = size, sum(sizes[low:high]), sum(sizes[low:index])
            groups.setdefault(shape, []).append((first + index, first + low, first + high))
    calls = []
    for shape, blocks in sorted(groups.items(), reverse=True):
        mask = make_mask(rule, *shape)
        keys = tuple((low, high) for _, low, high in blocks)
        calls.append(BlockCall(tuple(block[0] for block in blocks), keys, mask, rule.causal and mask is None))
    return BlockPlan(tuple(lengths), tuple(calls))


def _runs(segments: torch.Tensor | None, rows: int, num_tokens: int) -> list[tuple[int, bool]] | None:
    """Length and kind (is it padding?) of each stretch of one segment over the flattened rows."""
    if segments is None:
        return [(num_tokens, False)] * rows
    ids = segments.cpu().numpy()
    is_start = np.ones(ids.shape, dtype=bool)
    is_start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(is_start)
    values, owner = ids.reshape(-1)[starts], starts // num_tokens
    documents = np.stack([owner, values])[:, values != PAD_SEGMENT]
    if np.unique(documents, axis=1).shape[1] < documents.shape[1]:
        return None
    lengths = np.diff(starts, append=ids.size)
    return list(zip(lengths.tolist(), (values == PAD_SEGMENT).tolist()))


def visible(rule: AttentionRule, queries: int, keys: int, offset: int, device: torch.device) -> torch.Tensor | None:
    """Which keys each query of a block sees, boolean of shape `(queries, keys)`; `None` if it sees all of them."""
    distance = offset + torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    if rule.causal:
        seen = distance >= 0
        return seen if rule.window is None else seen & (distance < rule.window)
    return None if rule.window is None else distance.abs() <= rule.window


def run_blocks(
    plan: BlockPlan, attend: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attention of whole rows, block by block.

    Args:
        plan ([`BlockPlan`]): made for rows of this shape.
        attend (`Callable`): `(query, key, value, call) -> output` on stacked blocks, `(m, n, L, H)` in and
            `(m, L, n, H_v)` out.
        query (`torch.Tensor` of shape `(B, n, T, H)`); `key`, `value`: `(B, k, T, H)`.

    Returns:
        `torch.Tensor` of shape `(B, T, n, H_v)`; zero where there is padding.
    """
    rows, heads, num_tokens, _ = query.shape
    # One split and one concatenation, so that backward is one as well, and not a full-size sum for every block.
    queries, keys, values = (list(_split(tensor, plan.lengths)) for tensor in (query, key, value))
    outputs: list[torch.Tensor | None] = [None] * len(plan.lengths)
    for call in plan.calls:
        stacked = _stack(queries[index] for index in call.queries)
        seen = (_stack(_join(blocks[low:high]) for low, high in call.keys) for blocks in (keys, values))
        for index, output in zip(call.queries, attend(stacked, *seen, call).unbind(0)):
            outputs[index] = output
    for index, length in enumerate(plan.lengths):
        if outputs[index] is None:
            outputs[index] = value.new_zeros(length, heads, value.shape[-1])
    return _join(outputs, dim=0).view(rows, num_tokens, heads, -1)


def _split(tensor: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Blocks `(n, L, H)` of the flattened rows of `(B, n, T, H)`."""
    flat = tensor[0] if tensor.shape[0] == 1 else tensor.transpose(0, 1).flatten(1, 2)
    return flat.split(lengths, dim=1)


def _stack(blocks: Iterator[torch.Tensor]) -> torch.Tensor:
    stacked = list(blocks)
    return stacked[0][None] if len(stacked) == 1 else torch.stack(stacked)


def _join(blocks: list[torch.Tensor], dim: int = 1) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim)

"""Attention whose scores get a learned number for the distance between query and key, one table a head.

What: the keyword argument `distance_bias` of an attention function: `(n, 2 L - 1)` numbers, that of key minus query
distance `d` at `d + L - 1`. Inside a document distances are those of the row, so packed rows need nothing else, and a
rank takes the rows of its heads like every per-head input.

How: `sdpa` with the numbers as an additive mask, made for one block at a time: a document, or a window with its
neighbours. Blocks of equal shape share it.
Price: `n x L x L` numbers for the longest document, as the models that have such a table take themselves.
"""

from __future__ import annotations

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks import BlockCall, BlockPlan, plan_blocks, run_blocks, visible
from .call import AttentionCall
from .masks import KernelPlan, build_mask


DISTANCE_BIAS = "distance_bias"


def has_distance_bias(call: AttentionCall) -> bool:
    return call.per_head.get(DISTANCE_BIAS) is not None


def refuse_other_kernels(kernel: str, call: AttentionCall) -> None:
    """Raise `NotImplementedError` for a kernel that would drop the numbers."""
    if has_distance_bias(call) and kernel != "sdpa":
        raise NotImplementedError(
            f"this model adds numbers of relative positions to its scores (`{DISTANCE_BIAS}`), which '{kernel}' does "
            "not: use `inner_attention='auto'` or 'sdpa'."
        )


def refuse_unknown_rows(call: AttentionCall) -> None:
    """Raise `NotImplementedError` where a kernel of transformers would run as it is, and drop the numbers."""
    if has_distance_bias(call):
        raise NotImplementedError(
            f"`{type(call.module).__name__}` passes `{DISTANCE_BIAS}` for rows that no one has described, where "
            "transformers' kernels would drop it: pass the `sequence_shard` of the rows, too."
        )


def run_with_distance_bias(call: AttentionCall, plan: KernelPlan, view: object) -> torch.Tensor:
    """Run `sdpa` on whole rows of some heads, whose scores get the numbers of their distances.

    Args:
        call ([`AttentionCall`]): with a `distance_bias` of its heads.
        plan ([`KernelPlan`]): its `prepared` is a [`BlockPlan`], or `None` where a document is interrupted.
        view: the module as the kernel sees it.

    Returns:
        `torch.Tensor` of shape `(B, T, n, H_v)`.
    """
    table = call.per_head[DISTANCE_BIAS]
    assert table is not None
    table = table.to(call.query.dtype)

    def attend(query, key, value, mask) -> torch.Tensor:
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return function(view, query, key, value, mask, dropout=call.dropout, scaling=call.scaling, is_causal=False)[0]

    if not isinstance(plan.prepared, BlockPlan):
        rows, _, num_tokens, _ = call.query.shape
        mask = build_mask(plan, "eager", rows, num_tokens, call.query.dtype, call.query.device)
        return attend(call.query, call.key, call.value, mask + numbers_of(table, num_tokens, num_tokens, 0))
    made: dict[tuple[int, int, int], torch.Tensor] = {}

    def attend_block(query, key, value, block: BlockCall) -> torch.Tensor:
        lengths, (low, _) = plan.prepared.lengths, block.keys[0]
        shape = query.shape[2], key.shape[2], sum(lengths[low : block.queries[0]])
        if shape not in made:
            numbers = numbers_of(table, *shape)
            seen = visible(plan.rule, *shape, query.device)
            made[shape] = numbers if seen is None else numbers.masked_fill(~seen, torch.finfo(query.dtype).min)
        return attend(query, key, value, made[shape][None])

    return run_blocks(plan.prepared, attend_block, call.query, call.key, call.value)


def numbers_of(table: torch.Tensor, queries: int, keys: int, offset: int) -> torch.Tensor:
    """The numbers `(n, queries, keys)` of a block whose first query is `offset` tokens after its first key."""
    zero = (table.shape[-1] - 1) // 2
    places = torch.arange(keys, device=table.device) - torch.arange(queries, device=table.device)[:, None]
    return table[:, places - offset + zero]


def blocks_for_distances(plan: KernelPlan, rows: int, num_tokens: int) -> BlockPlan | None:
    """How rows are cut; `None` where a document is interrupted by padding."""
    return plan_blocks(plan.rule, plan.segments, rows, num_tokens, lambda *_: None)

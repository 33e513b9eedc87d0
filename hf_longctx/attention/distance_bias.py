"""Attention whose scores get a number for the distance between query and key, one table a head.

What: the keyword argument `distance_bias` of an attention function: `(n, 2 L - 1)` numbers, that of key minus query
distance `d` at `d + L - 1`. They are learned (MPNet), or a slope times the distance (ALiBi). Inside a document
distances are those of the row, so packed rows need nothing else, and a rank takes the rows of its heads like every
per-head input. `key_bias`, `(n, L)`, is the other form of ALiBi, a number for each place in a document.

How: `sdpa` with the numbers as an additive mask, made for one block at a time: a document, or a window with its
neighbours. Blocks of equal shape share it; of a block with more queries than [`QUERY_BLOCK`], it is made for those at
a time, and made again in the backward. On CUDA flex attention computes the numbers instead, if it is chosen.
Price: `n x 512 x L` numbers for the longest document `L`.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks import BlockCall, BlockPlan, plan_blocks, run_blocks, visible
from .call import AttentionCall
from .deferred import DeferredMask
from .masks import KernelPlan, build_mask


DISTANCE_BIAS, KEY_BIAS = "distance_bias", "key_bias"
# Queries of a long document whose numbers exist at a time.
QUERY_BLOCK = 512


def has_distance_bias(call: AttentionCall) -> bool:
    return any(call.per_head.get(name) is not None for name in (DISTANCE_BIAS, KEY_BIAS))


def refuse_other_kernels(kernel: str, call: AttentionCall) -> None:
    """Raise `NotImplementedError` for a kernel that would drop the numbers."""
    runs_flex = kernel == "flex_attention" and call.per_head.get(KEY_BIAS) is None and not call.dropout
    if has_distance_bias(call) and kernel not in ("sdpa", "eager") and not runs_flex:
        raise NotImplementedError(
            f"this model adds numbers of relative positions to its scores (`{DISTANCE_BIAS}`), which '{kernel}' does "
            "not: use `inner_attention='auto'` or 'sdpa'."
        )


def run_after_cache(call: AttentionCall) -> torch.Tensor:
    """Attention of the last tokens of rows to all keys of a cache, one document a row.

    Args:
        call ([`AttentionCall`]): all heads; `q` queries and `k` keys, the last of which are the queries'.

    Returns:
        `torch.Tensor` of shape `(B, q, n, H_v)`.
    """
    query, key, value = call.query, call.key, call.value
    queries, keys = query.shape[2], key.shape[2]
    mask = call.mask.build("eager") if isinstance(call.mask, DeferredMask) else call.mask
    numbers = _numbers(call, queries, keys, keys - queries)[None]
    if isinstance(mask, torch.Tensor):
        numbers = numbers + mask[..., :keys]
    scaling = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, numbers, dropout_p=call.dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2)


def run_with_distance_bias(call: AttentionCall, plan: KernelPlan, view: object) -> torch.Tensor:
    """Run `sdpa` on whole rows of some heads, whose scores get the numbers of their distances.

    Args:
        call ([`AttentionCall`]): with a `distance_bias` of its heads.
        plan ([`KernelPlan`]): its `prepared` is a [`BlockPlan`], or `None` where a document is interrupted.
        view: the module as the kernel sees it.

    Returns:
        `torch.Tensor` of shape `(B, T, n, H_v)`.
    """

    def attend(query, key, value, mask) -> torch.Tensor:
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return function(view, query, key, value, mask, dropout=call.dropout, scaling=call.scaling, is_causal=False)[0]

    if not isinstance(plan.prepared, BlockPlan):
        rows, _, num_tokens, _ = call.query.shape
        mask = build_mask(plan, "eager", rows, num_tokens, call.query.dtype, call.query.device)
        return attend(call.query, call.key, call.value, mask + _numbers(call, num_tokens, num_tokens, 0))
    made: dict[tuple[int, int, int], torch.Tensor] = {}

    def mask_of(queries: int, keys: int, offset: int) -> torch.Tensor:
        numbers = _numbers(call, queries, keys, offset)
        seen = visible(plan.rule, queries, keys, offset, call.query.device)
        return numbers if seen is None else numbers.masked_fill(~seen, torch.finfo(numbers.dtype).min)

    def attend_part(query, key, value, offset: int) -> torch.Tensor:
        return attend(query, key, value, mask_of(query.shape[2], key.shape[2], offset)[None])

    def attend_block(query, key, value, block: BlockCall) -> torch.Tensor:
        lengths, (low, _) = plan.prepared.lengths, block.keys[0]
        offset = sum(lengths[low : block.queries[0]])
        shape = query.shape[2], key.shape[2], offset
        if query.shape[2] <= QUERY_BLOCK:
            if shape not in made:
                made[shape] = mask_of(*shape)
            return attend(query, key, value, made[shape][None])
        parts = []
        for start in range(0, query.shape[2], QUERY_BLOCK):
            part = query[:, :, start : start + QUERY_BLOCK]
            parts.append(checkpoint(attend_part, part, key, value, offset + start, use_reentrant=False))
        return torch.cat(parts, dim=1)

    return run_blocks(plan.prepared, attend_block, call.query, call.key, call.value)


def run_flex(call: AttentionCall, mask: object) -> torch.Tensor:
    """Run flex attention on whole rows of some heads; the numbers are looked up where a score is computed.

    Args:
        call ([`AttentionCall`]): with a `distance_bias` of its heads.
        mask (`BlockMask`): of the rows.
    """
    table, query = call.per_head[DISTANCE_BIAS], call.query
    assert table is not None
    zero = (table.shape[-1] - 1) // 2

    def add(score, row, head, place, key_place):
        return score + table[head, key_place - place + zero].to(score.dtype)

    output = compile_friendly_flex_attention(
        query,
        call.key,
        call.value,
        training=torch.is_grad_enabled(),
        score_mod=add,
        block_mask=mask,
        enable_gqa=query.shape[1] != call.key.shape[1],
        scale=call.scaling,
    )
    return output.transpose(1, 2).contiguous()


def _numbers(call: AttentionCall, queries: int, keys: int, offset: int) -> torch.Tensor:
    """What is added to the scores of a block, in the precision of the queries."""
    table, by_key = call.per_head.get(DISTANCE_BIAS), call.per_head.get(KEY_BIAS)
    if table is None:
        assert by_key is not None
        return by_key.to(call.query.dtype)[:, None, :keys].expand(-1, queries, -1)
    return numbers_of(table, queries, keys, offset).to(call.query.dtype)


def numbers_of(table: torch.Tensor, queries: int, keys: int, offset: int) -> torch.Tensor:
    """The numbers `(n, queries, keys)` of a block whose first query is `offset` tokens after its first key."""
    zero = (table.shape[-1] - 1) // 2
    places = torch.arange(keys, device=table.device) - torch.arange(queries, device=table.device)[:, None]
    return table[:, places - offset + zero]


def blocks_for_distances(plan: KernelPlan, rows: int, num_tokens: int) -> BlockPlan | None:
    """How rows are cut; `None` where a document is interrupted by padding."""
    return plan_blocks(plan.rule, plan.segments, rows, num_tokens, lambda *_: None)

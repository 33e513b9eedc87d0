"""Attention whose scores get a number for the distance between query and key, a rule of its own for each head.

What: one of three keyword arguments of an attention function, cut by heads like every per-head input. Inside a
document distances are those of the row, so packed rows need nothing else.

- `alibi_slopes`, `(n,)`: ALiBi, `-slope * |d|` for a distance `d`; see [`alibi`][hf_longctx.attention.alibi].
- `key_bias`, `(n, L)`: its other form, a number for each place in a document.
- `distance_bias`, `(n, 2 L - 1)`: learned numbers (MPNet), that of key minus query `d` at `d + L - 1`.

How: `sdpa` (or `eager`) with the numbers as an additive mask, made for one block at a time: a document, or a window
with its neighbours. Blocks of equal shape share it; of a block with more queries than [`QUERY_BLOCK`], it is made for
those at a time, and made again in the backward. Flex attention computes slopes itself: on CUDA, where it is chosen.
Price: `n x 512 x L` numbers for the longest document `L`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks import BlockCall, BlockPlan, plan_blocks, run_blocks, visible
from .call import AttentionCall
from .deferred import DeferredMask
from .eager import eager_attention
from .masks import KernelPlan, build_mask


DISTANCE_BIAS, KEY_BIAS, ALIBI = "distance_bias", "key_bias", "alibi_slopes"
NUMBERS = (DISTANCE_BIAS, KEY_BIAS, ALIBI)
# Queries of a long document whose numbers exist at a time.
QUERY_BLOCK = 512
# Smaller heads have no flex kernel on CUDA.
_SMALLEST_HEAD = 16


def has_distance_bias(call: AttentionCall) -> bool:
    return numbers_given(call) is not None


def numbers_given(call: AttentionCall) -> str | None:
    """Which of the keyword arguments a call has."""
    return next((name for name in NUMBERS if call.per_head.get(name) is not None), None)


def suits_flex(call: AttentionCall) -> bool:
    """Whether flex attention computes a call with slopes on CUDA: no dropout, and the sizes and precisions it has."""
    query = call.query
    is_known = query.dtype != torch.float64 and query.shape[-1] >= _SMALLEST_HEAD
    return numbers_given(call) == ALIBI and is_known and not call.dropout


def refuse_other_kernels(kernel: str, call: AttentionCall) -> None:
    """Raise `NotImplementedError` for a kernel that would drop the numbers."""
    name = numbers_given(call)
    needs_more = call.per_head.get("s_aux") is not None or call.extras.get("softcap") is not None
    runs_flex = kernel == "flex_attention" and name != KEY_BIAS and not call.dropout and not needs_more
    if name is not None and kernel not in ("sdpa", "eager") and not runs_flex:
        raise NotImplementedError(
            f"this model adds numbers of relative positions to its scores (`{name}`), which '{kernel}' does "
            "not: use `inner_attention='auto'`."
        )


def run_after_cache(kernel: str, call: AttentionCall) -> torch.Tensor:
    """Attention of the last tokens of rows to all keys of a cache, one document a row.

    Args:
        kernel (`str`): `"sdpa"` or `"eager"`.
        call ([`AttentionCall`]): all heads; the mask says which places its queries and keys have.

    Returns:
        `torch.Tensor` of shape `(B, q, n, H_v)`.

    Raises:
        NotImplementedError: a mask that the model made itself, which does not say so.
    """
    queries, keys, mask = call.query.shape[2], call.key.shape[2], call.mask
    if not isinstance(mask, DeferredMask):
        raise NotImplementedError(
            f"`{type(call.module).__name__}` attends from {queries} to {keys} tokens under a mask of its own, which "
            f"does not say how far apart they are (`{numbers_given(call)}`): pass `use_cache=False`."
        )
    numbers = _numbers(call, queries, keys, mask.offset)
    built: Any = mask.build("eager")
    view = SimpleNamespace(num_key_value_groups=call.query.shape[1] // call.key.shape[1], is_causal=False)
    return _attend(kernel, call, view)(call.query, call.key, call.value, numbers + built[..., :keys])


def run_with_distance_bias(kernel: str, call: AttentionCall, plan: KernelPlan, view: object) -> torch.Tensor:
    """Run a kernel that takes a mask on whole rows of some heads, whose scores get the numbers of their distances.

    Args:
        kernel (`str`): `"sdpa"` or `"eager"`.
        call ([`AttentionCall`]): with the numbers of its heads.
        plan ([`KernelPlan`]): its `prepared` is a [`BlockPlan`], or `None` where a document is interrupted.
        view: the module as the kernel sees it.

    Returns:
        `torch.Tensor` of shape `(B, T, n, H_v)`.
    """
    attend = _attend(kernel, call, view)
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


def _attend(kernel: str, call: AttentionCall, view: object) -> Callable:
    """`(query, key, value, mask) -> output` of a kernel, with the settings of a call."""
    extras: dict[str, Any] = {"dropout": call.dropout, "scaling": call.scaling, "is_causal": False}
    if kernel == "eager":
        extras |= {"softcap": call.extras.get("softcap"), "s_aux": call.per_head.get("s_aux")}
    function = eager_attention if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]
    return lambda query, key, value, mask: function(view, query, key, value, mask, **extras)[0]


def run_flex(call: AttentionCall, mask: object) -> torch.Tensor:
    """Run flex attention on whole rows of some heads; the numbers are computed where a score is.

    Args:
        call ([`AttentionCall`]): with the `alibi_slopes` or the `distance_bias` of its heads.
        mask (`BlockMask`): of the rows.
    """
    query, key, value = call.query, call.key, call.value
    heads, shared = query.shape[1], key.shape[1]
    if heads & (heads - 1) and heads != shared:  # as transformers does: the kernel shares keys among powers of two
        key, value = (tensor.repeat_interleave(heads // shared, dim=1) for tensor in (key, value))
    output = compile_friendly_flex_attention(
        query,
        key,
        value,
        training=torch.is_grad_enabled(),
        score_mod=score_rule(call),
        block_mask=mask,
        enable_gqa=heads != key.shape[1],
        scale=call.scaling,
    )
    return output.transpose(1, 2).contiguous()


def score_rule(call: AttentionCall) -> Callable:
    """The `score_mod` of flex attention: what is added to one score, in the precision of scores."""
    table, slopes = call.per_head.get(DISTANCE_BIAS), call.per_head.get(ALIBI)
    if slopes is not None:
        return lambda score, row, head, i, j: score - (slopes[head] * (i - j).abs()).to(score.dtype)
    assert table is not None
    zero = (table.shape[-1] - 1) // 2
    return lambda score, row, head, i, j: score + table[head, j - i + zero].to(score.dtype)


def _numbers(call: AttentionCall, queries: int, keys: int, offset: int | torch.Tensor) -> torch.Tensor:
    """What is added to the scores of a block, `(n, queries, keys)`, rounded to the precision of the queries."""
    by_key, dtype, device = call.per_head.get(KEY_BIAS), call.query.dtype, call.query.device
    if by_key is not None:
        return by_key.to(dtype)[:, None, :keys].expand(-1, queries, -1)
    distances = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - offset
    slopes, table = call.per_head.get(ALIBI), call.per_head.get(DISTANCE_BIAS)
    if slopes is not None:
        return (-slopes.to(torch.promote_types(dtype, torch.float32))[:, None, None] * distances.abs()).to(dtype)
    assert table is not None
    return table[:, distances + (table.shape[-1] - 1) // 2].to(dtype)


def blocks_for_distances(plan: KernelPlan, rows: int, num_tokens: int) -> BlockPlan | None:
    """How rows are cut; `None` where a document is interrupted by padding."""
    blocks = plan_blocks(plan.rule, plan.segments, rows, num_tokens, lambda *_: None)
    if blocks is None:
        return None
    sizes = [
        min(blocks.lengths[call.queries[0]], QUERY_BLOCK) * sum(blocks.lengths[slice(*call.keys[0])])
        for call in blocks.calls
    ]
    return replace(blocks, numbers=max(sizes, default=0))

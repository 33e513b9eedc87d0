"""Torch's own flash kernel for rows of segments: `torch.nn.attention.varlen`, on CUDA in half precision.

It needs no package but torch. Where it does not fit (see [`fits`]) the segments go through `sdpa` block by block.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import cache

import torch

from .masks import AttentionRule


_HEAD_SIZE_LIMIT = 256


@dataclass(frozen=True)
class VarlenBounds:
    """Segments of the flattened rows: `bounds` 32-bit of shape `(segments + 1,)`, and the `longest` of them."""

    bounds: torch.Tensor
    longest: int


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the kernel computes this call: device, precision, head sizes and no dropout."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= _HEAD_SIZE_LIMIT
        and query.shape[-1] % 8 == 0
        and not dropout
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _is_available()
    )


@cache
def _is_available() -> bool:
    """Whether this torch has the kernel, with windows: its first releases could only do causal or full attention."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "scale", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def run_varlen(
    rule: AttentionRule,
    facts: VarlenBounds,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of whole rows under `rule`, each segment by itself.

    Args:
        query (`torch.Tensor` of shape `(B, n, T, H)`); `key`, `value`: `(B, k, T, H)`.

    Returns:
        `torch.Tensor` of shape `(B, T, n, H)`. Rows of padding hold numbers that mean nothing.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, num_tokens, size = query.shape
    flat = (tensor.transpose(1, 2).reshape(rows * num_tokens, -1, size) for tensor in (query, key, value))
    # The kernel counts neighbours on either side; a causal window counts the token itself.
    behind = -1 if rule.window is None else rule.window - 1 if rule.causal else rule.window
    ahead = 0 if rule.causal else behind
    limits = facts.bounds, facts.bounds, facts.longest, facts.longest
    output = varlen_attn(*flat, *limits, scale=scaling, window_size=(behind, ahead), enable_gqa=key.shape[1] != heads)
    return output.view(rows, num_tokens, heads, size)

"""What LSH attention holds, for simulations on fake tensors: see [`lsh_rounds`][hf_longctx.attention.lsh_rounds].

Kept for the backward are query, value, output, two numbers a token and head and the buckets of all rounds. While it
runs, one head is there once more: its vectors by place, its gradients in float32, and the order of one round.
"""

from __future__ import annotations

import torch


# Scores that exist at a time on a GPU, with the weights made of them, and their gradients.
_SCORES = 2**24
# 64-bit numbers a token: labels, their sorted copy and order, queries of blocks, and keys, which are twice as many.
_ORDER = 8


class HashedKernel(torch.autograd.Function):
    """`(B, n, T, H)` to `(B, T, n, H_v)`."""

    @staticmethod
    def forward(ctx, num_hashes: int, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        output = value.new_empty((rows, tokens, heads, value.shape[-1]))
        numbers = [query.new_empty((rows, heads, tokens), dtype=torch.float32) for _ in range(2)]
        buckets = query.new_empty((num_hashes, rows, heads, tokens), dtype=torch.int16)
        ctx.save_for_backward(query, value, output, *numbers, buckets)
        held = _workspace(query, value, scores=2)
        del held
        return output

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        query, value, *_ = ctx.saved_tensors
        gradients = torch.empty_like(query), torch.empty_like(value)
        held = _workspace(query, value, scores=4)
        held += [query.new_empty((query.shape[2], query.shape[3]), dtype=torch.float32) for _ in range(2)]
        del held
        return None, *gradients


def _workspace(query: torch.Tensor, value: torch.Tensor, scores: int) -> list[torch.Tensor]:
    tokens, sizes = query.shape[2], (query.shape[3], query.shape[3], value.shape[3])
    held = [query.new_empty((tokens, size)) for size in sizes]
    held += [value.new_empty((tokens, value.shape[3]), dtype=torch.float32)]
    held += [query.new_empty((tokens, _ORDER), dtype=torch.int64)]
    return held + [query.new_empty((_SCORES,), dtype=torch.float32) for _ in range(scores)]

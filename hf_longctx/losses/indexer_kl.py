"""The loss of an indexer: it should score keys as attention weighs them.

What: `KL(p || softmax(scores))` for every query, with `p` the attention of all heads to the keys that are looked at,
summed over heads and made to add up to 1. Attention is the target and gets no gradient; what made the scores does.

How: the gradient is put into the backward of the layer's output ([`inject_gradient`]), so activation checkpointing,
tiled losses and every trainer work as they are, and the model's own loss stays what it is.
Source: DeepSeek-V3.2, arXiv 2512.02556, section 2.1.
"""

from __future__ import annotations

import torch


def attention_target(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scaling: float) -> torch.Tensor:
    """What an indexer learns from: attention without window and sink, as one distribution a query.

    Args:
        query (`torch.Tensor` of shape `(B, N, q, H)`): all heads.
        key (`torch.Tensor` of shape `(B, K, T, H)`, or `(B, K, q, k, H)`): the same keys for all queries, or picked
            ones for each.
        seen (`torch.Tensor` of shape `(B, q, T)` or `(B, q, k)`): which of them a query may see.
        scaling (`float`): of the scores.

    Returns:
        `torch.Tensor` of shape `(B, q, T)` or `(B, q, k)`, float32 or more: adds up to 1, or to 0 where nothing is
        seen. Gradient: none.
    """
    with torch.no_grad():
        rows, heads, queries, _ = query.shape
        grouped = query.view(rows, key.shape[1], heads // key.shape[1], queries, -1)
        rule = "bgnqh,bgkh->bgnqk" if key.dim() == 4 else "bgnqh,bgqkh->bgnqk"
        scores = torch.einsum(rule, grouped, key) * scaling
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        mask = seen[:, None, None]
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return torch.where(mask, weights, 0.0).mean(dim=(1, 2))


def indexer_divergence(scores: torch.Tensor, target: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """`KL(target || softmax(scores))`, added up over queries.

    Args:
        scores (`torch.Tensor` of shape `(B, q, k)`): of the indexer.
        target (`torch.Tensor` of shape `(B, q, k)`): see [`attention_target`].
        seen (`torch.Tensor` of shape `(B, q, k)`): which keys a query may see; queries that see none count nothing.

    Returns:
        `torch.Tensor`: a scalar. Gradient: of the scores.
    """
    scores = scores.to(target.dtype).masked_fill(~seen, torch.finfo(target.dtype).min)
    gap = torch.xlogy(target, target) - target * scores.log_softmax(dim=-1)
    return torch.where(seen, gap, 0.0).sum()


def inject_gradient(output: torch.Tensor, loss: torch.Tensor, weight: float) -> torch.Tensor:
    """`output` itself, in whose backward `weight` times the gradient of `loss` is added to that of the model's loss.

    Args:
        output (`torch.Tensor`): of the layer; it must reach the loss that backward is called on.
        loss (`torch.Tensor`): a scalar.
        weight (`float`): its factor, whatever the loss is scaled by.
    """
    return _InjectGradient.apply(output, loss, weight)


class _InjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, loss, weight):
        ctx.weight, ctx.kind = weight, (loss.dtype, loss.device)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        dtype, device = ctx.kind
        return grad, torch.full((), ctx.weight, dtype=dtype, device=device), None

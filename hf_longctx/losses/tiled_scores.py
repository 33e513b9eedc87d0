"""Log-probability, entropy and top-1 hit of every token, without the logits of a whole row.

What metrics of fine-tuning and losses on preferences read. A per-token output has no upstream gradient until the
backward, so the gradient cannot be made in the forward: the backward makes each tile of logits again. Price: a fourth
matmul where gradients are needed; without, one matmul and nothing kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from ..parallel.shard import IGNORE_INDEX
from .tiled_logits import add_gradients, make_logits, validate_head
from .tiles import (
    TokenLoss,
    ValidTokens,
    choose_tile_size,
    validate_hidden,
    validate_tile_size,
    wide_dtype,
    without_autocast,
)


OUTPUTS = ("log_probs", "entropy", "is_top1")
# Likelihoods below exp of this are 0 in fp64 too. A logit of minus infinity is raised to it: 0 times infinity is NaN.
_NEVER = -1e4


@dataclass(frozen=True)
class TokenScores:
    """One entry a token, of the labels' shape, 0 or `False` where the label is ignored; `None` if not asked for.

    Args:
        log_probs (`torch.Tensor`, *optional*): log-probability of the label; differentiable.
        entropy (`torch.Tensor`, *optional*): entropy of the distribution over words, in nats; differentiable.
        is_top1 (`torch.Tensor`, *optional*): whether the label is the `argmax` of the logits.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def tiled_token_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    tile_size: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    outputs: Sequence[str] = OUTPUTS,
) -> TokenScores:
    """How `hidden @ weight.T + bias` scores the label of every token, one tile of logits at a time.

    Args:
        hidden, weight, labels, bias, tile_size, scale, softcap, ignore_index: see [`tiled_cross_entropy`]. A
            temperature is a `scale` of its inverse.
        outputs (`Sequence[str]`, *optional*): which fields of [`TokenScores`] to compute; all by default.

    Returns:
        [`TokenScores`]: in fp32, or in fp64 if `hidden` is.

    Raises:
        ValueError: an unknown output, or see [`tiled_cross_entropy`].

    Relations: `log_softmax`, its entropy and `argmax` of the logits after scale and softcap; `-log_probs.sum()` over
    the valid tokens is `tiled_cross_entropy`, which needs one matmul less for the gradient.
    Gradient: of `log_probs` and `entropy`, by making the logits again tile by tile.
    Memory: one tile of logits in fp32 (two with entropy), and in the backward the gradients of `hidden` and, in fp32,
    of `weight`.
    Communication: none.
    """
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown or not outputs:
        raise ValueError(
            f"`outputs` ({list(outputs)!r}) must name at least one of {', '.join(OUTPUTS)}, and no other."
        )
    validate_tile_size(tile_size)
    validate_hidden(hidden, labels)
    dtype = validate_head(hidden, weight, bias)
    tokens = ValidTokens.of(labels, ignore_index, hidden.device)
    rule = TokenLoss(scale=scale, softcap=softcap)
    job = _Job(tokens, rule, dtype, choose_tile_size(tile_size, len(weight)), tuple(outputs))
    values = _TokenScores.apply(job, hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    found = {}
    for name, value in zip(OUTPUTS, values):
        if name in outputs:
            rows = value.new_zeros(labels.numel()).index_copy(0, tokens.places, value)
            found[name] = rows.view(labels.shape)
    return TokenScores(**found)


@dataclass(frozen=True)
class _Job:
    """What does not change between the forward and the backward."""

    tokens: ValidTokens
    rule: TokenLoss
    dtype: torch.dtype
    tile_size: int
    outputs: tuple[str, ...]


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job: _Job, hidden, weight, bias):
        ctx.set_materialize_grads(False)
        wide, count = wide_dtype(job.dtype), len(job.tokens)
        log_probs, entropy, log_totals = (hidden.new_empty(count, dtype=wide) for _ in range(3))
        is_top1 = torch.empty(count, dtype=torch.bool, device=hidden.device)
        with without_autocast(hidden.device):
            head = weight.to(job.dtype)
            for part, _, targets, _, logits in make_logits(hidden, head, bias, job.tokens, job.tile_size):
                job.rule.transform(logits, with_slope=False)
                if "is_top1" in job.outputs:
                    is_top1[part] = logits.argmax(1) == targets
                log_totals[part], log_probs[part], entropy[part] = _score(logits, targets, "entropy" in job.outputs)
        ctx.job = job
        ctx.save_for_backward(hidden, weight, bias, log_totals, entropy)
        ctx.mark_non_differentiable(is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, for_log_probs, for_entropy, _):
        if for_log_probs is None and for_entropy is None:  # what followed gave no gradient to either
            return None, None, None, None
        job, (hidden, weight, bias, log_totals, entropy) = ctx.job, ctx.saved_tensors
        wide, needs = wide_dtype(job.dtype), ctx.needs_input_grad[1:]
        gradients = [torch.zeros_like(hidden) if needs[0] else None]
        gradients += [torch.zeros_like(x, dtype=wide) if n else None for x, n in zip((weight, bias), needs[1:])]
        with without_autocast(hidden.device):
            head = weight.to(job.dtype)
            for part, places, targets, inputs, logits in make_logits(hidden, head, bias, job.tokens, job.tile_size):
                per_token = [None if x is None else x[part] for x in (for_log_probs, for_entropy, log_totals, entropy)]
                _overwrite_with_gradient(logits, targets, per_token, job.rule)
                add_gradients(gradients, logits, inputs, head, places)
        tensors = (hidden, weight, bias)
        return None, *(None if g is None else g.to(x.dtype) for g, x in zip(gradients, tensors))


def _score(z: torch.Tensor, targets: torch.Tensor, with_entropy: bool):
    """Of a tile of final logits, which are spent: log of the sum, log-probability of the target, entropy."""
    largest = z.amax(1, keepdim=True)
    on_target = z.sub_(largest).gather(1, targets[:, None])
    if not with_entropy:
        log_total = z.exp_().sum(1, keepdim=True).log()
        entropy = log_total
    else:
        likelihood = z.clamp_(min=_NEVER).exp()
        total = likelihood.sum(1, keepdim=True)
        log_total = total.log()
        entropy = log_total - z.mul_(likelihood).sum(1, keepdim=True) / total
    return tuple(score.squeeze(1) for score in (largest + log_total, on_target - log_total, entropy))


def _overwrite_with_gradient(z: torch.Tensor, targets: torch.Tensor, per_token: list, rule: TokenLoss) -> None:
    """From a tile of the head's logits to the gradient of what `per_token` weighs: the slopes of the two outputs."""
    for_log_probs, for_entropy, log_totals, entropy = (None if x is None else x[:, None] for x in per_token)
    target, slope = targets[:, None], rule.transform(z, with_slope=True)
    if for_entropy is None and for_log_probs is not None:
        z.sub_(log_totals).exp_().mul_(-for_log_probs)
    elif for_entropy is not None:
        likelihood = z.sub_(log_totals).clamp_(min=_NEVER).exp()
        weight = for_entropy * entropy if for_log_probs is None else for_entropy * entropy + for_log_probs
        # d log p / d z is target minus likelihood, d entropy / d z is -likelihood * (log likelihood + entropy).
        z.mul_(-for_entropy).sub_(weight).mul_(likelihood)
    if for_log_probs is not None:
        z.scatter_(1, target, z.gather(1, target) + for_log_probs)
    rule.undo(z, slope)

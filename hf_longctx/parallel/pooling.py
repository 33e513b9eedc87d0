"""One vector a span of tokens, from a row whose tokens may live on several ranks.

A document's embedding needs a sum, a maximum or one of its tokens. Each rank reduces what it holds, and the ranks
exchange one vector a span, never hidden states: `n x D` numbers instead of `T x D`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .collectives import sum_over_sequence


POOLING_MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")


@dataclass(frozen=True)
class Spans:
    """Which tokens of a flat row belong together.

    Args:
        starts (`torch.Tensor` of shape `(n,)`): first token of each span, counted over the whole row.
        ends (`torch.Tensor` of shape `(n,)`): one past the last. A span may be empty.
        origins (`torch.Tensor` of shape `(n,)`): the token from which `"weightedmean"` counts positions, from 1.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    origins: torch.Tensor

    @classmethod
    def of_documents(cls, bounds: torch.Tensor, skipped: int = 0) -> Spans:
        """Whole documents of `cu_seq_lens` (`(n + 1,)`), less their first `skipped` tokens (a prompt)."""
        bounds = bounds.long()
        starts, ends = bounds[:-1], bounds[1:]
        return cls(torch.minimum(starts + skipped, ends), ends, starts)


def pool_spans(
    hidden: torch.Tensor,
    spans: Spans,
    modes: tuple[str, ...],
    *,
    first_token: int = 0,
    group: dist.ProcessGroup | None = None,
) -> list[torch.Tensor]:
    """One vector a span and mode.

    Args:
        hidden (`torch.Tensor` of shape `(t, D)`): my tokens, without padding at the end of the row.
        spans ([`Spans`]): `n` spans of the whole row.
        modes (`tuple[str]`): of `POOLING_MODES`.
        first_token (`int`): where in the row my tokens begin.
        group (`ProcessGroup`, *optional*): the `sp` axis; `None` if I hold the whole row.

    Returns:
        `list[torch.Tensor]` of shape `(n, D)`, one for each mode, the same on every rank. An empty span (a text that
        is all prompt) has mean 0 and maximum `-inf`.

    Communication: one all-reduce of `(n, D)` per mode that is a sum or a token, together; one more for `"max"`. The
        same backward.
    Gradient: see [`sum_over_sequence`]. Tokens that share a maximum share its gradient evenly, on whatever rank.
    """
    work = torch.float32 if hidden.dtype in (torch.float16, torch.bfloat16) else hidden.dtype
    num_spans, num_tokens = len(spans.starts), len(hidden)
    starts = (spans.starts - first_token).clamp(0, num_tokens)
    lengths = (spans.ends - first_token).clamp(0, num_tokens) - starts
    span_of = torch.repeat_interleave(torch.arange(num_spans, device=hidden.device), lengths)
    before = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    tokens = torch.arange(len(span_of), device=hidden.device) + before
    picked = None

    def sum_of(weights: torch.Tensor | None) -> torch.Tensor:
        values = picked if weights is None else picked * weights[:, None]
        return hidden.new_zeros(num_spans, hidden.shape[1], dtype=work).index_add(0, span_of, values)

    def token_at(index: torch.Tensor) -> torch.Tensor:
        mine = (index >= first_token) & (index < first_token + num_tokens)
        if num_tokens == 0:
            return hidden.new_zeros(num_spans, hidden.shape[1], dtype=work) + hidden.sum()
        found = hidden[(index - first_token).clamp(0, num_tokens - 1)].to(work)
        return torch.where(mine[:, None], found, 0)

    if any(mode not in ("cls", "lasttoken") for mode in modes):
        picked = hidden.index_select(0, tokens).to(work)
    partial: dict[str, torch.Tensor] = {}
    for mode in modes:
        if mode == "cls":
            # A text no longer than its prompt gives the prompt's first token, as in sentence-transformers.
            partial[mode] = token_at(torch.where(spans.starts < spans.ends, spans.starts, spans.origins))
        elif mode == "lasttoken":
            partial[mode] = token_at(spans.ends - 1)
        elif mode in ("mean", "mean_sqrt_len_tokens") and "mean" not in partial:
            partial["mean"] = sum_of(None)
        elif mode == "weightedmean":
            partial[mode] = sum_of((tokens + first_token - spans.origins[span_of] + 1).to(work))
    totals: dict[str, torch.Tensor] = {}
    if partial:
        summed = sum_over_sequence(torch.cat(list(partial.values()), dim=1), group)
        totals = dict(zip(partial, summed.split(hidden.shape[1], dim=1)))
    if "max" in modes:
        totals["max"] = _MaxOfSpans.apply(picked, span_of, num_spans, group)
    return [_finish(mode, totals, spans, work).to(hidden.dtype) for mode in modes]


def _finish(mode: str, totals: dict[str, torch.Tensor], spans: Spans, work: torch.dtype) -> torch.Tensor:
    """Divide the sums. The divisors are counts of whole spans, so they need no communication."""
    if mode not in ("mean", "mean_sqrt_len_tokens", "weightedmean"):
        return totals[mode]
    lengths = (spans.ends - spans.starts).double()
    if mode == "mean":
        divisor = lengths
    elif mode == "mean_sqrt_len_tokens":
        divisor = lengths.sqrt()
    else:  # the sum of the positions first, first + 1, ...
        first = (spans.starts - spans.origins + 1).double()
        divisor = lengths * (first + (lengths - 1) / 2)
    total = totals["mean" if mode == "mean_sqrt_len_tokens" else mode]
    return total / divisor.clamp(min=1e-9).to(work)[:, None]


class _MaxOfSpans(torch.autograd.Function):
    """The largest value of each span in each dimension, over all ranks."""

    @staticmethod
    def forward(ctx, picked, span_of, num_spans, group):
        index = span_of[:, None].expand(-1, picked.shape[1])
        largest = picked.new_full((num_spans, picked.shape[1]), -torch.inf)
        largest = largest.scatter_reduce(0, index, picked, reduce="amax")
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        ctx.save_for_backward(picked, span_of, largest)
        ctx.group = group
        return largest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        picked, span_of, largest = ctx.saved_tensors
        is_largest = (picked == largest[span_of]).to(grad.dtype)
        shares = torch.zeros_like(grad).index_add(0, span_of, is_largest)
        both = torch.cat((grad, shares), dim=1)
        if ctx.group is not None:
            dist.all_reduce(both, group=ctx.group)
        grad, shares = both.split(grad.shape[1], dim=1)
        return is_largest * (grad / shares.clamp(min=1))[span_of], None, None, None

"""What every rank of the `sp` axis computed about its own tokens, gathered with its gradient.

For layers that hand something on along the sequence: the last tokens of a convolution, the state of a recurrence.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .collectives import gather_sequence
from .imaginary import ImaginaryRanks, place_in
from .shard import SequenceShard
from .stopwatch import Stopwatch


def gather_shares(
    local: torch.Tensor, group: dist.ProcessGroup | ImaginaryRanks, stopwatch: Stopwatch | None = None
) -> torch.Tensor:
    """Every rank's tensor of one shape `S`, in rank order.

    Args:
        local (`torch.Tensor` of shape `S`): mine; every rank passes the same shape and dtype.
        group (`ProcessGroup`): the `sp` axis.
        stopwatch ([`Stopwatch`], *optional*): times the collectives, forward and backward.

    Returns:
        `torch.Tensor` of shape `(P, *S)`. Every rank must let a gradient reach it, be it of zeros, or the others hang
        in the backward: see [`joined`].

    Communication: one all-gather; one reduce-scatter in the backward.
    Gradient: the sum of what all ranks computed for my part, no scaling.
    Memory: `P` times `S`.
    """
    return _GatherShares.apply(local, group, stopwatch)


def gather_tokens(
    local: torch.Tensor, group: dist.ProcessGroup | None, stopwatch: Stopwatch | None = None
) -> torch.Tensor:
    """Whole rows of what every rank computed for its tokens.

    Args:
        local (`torch.Tensor` of shape `(B, t, ...)`): mine; every rank passes the same shape and dtype.
        group (`ProcessGroup`, *optional*): the `sp` axis; `None` returns `local` itself.
        stopwatch ([`Stopwatch`], *optional*): times the collectives, forward and backward.

    Returns:
        `torch.Tensor` of shape `(B, P t, ...)`: tokens in rank order, the same on every rank.

    Communication: one all-gather; one reduce-scatter in the backward.
    Gradient: the sum of what all ranks computed for my tokens, no scaling. Every rank computes the same loss of whole
        rows, and wrappers average over ranks, so the two factors of `P` cancel. Integers and booleans have none.
    Memory: `P` times `local`.
    """
    if group is None:
        return local
    if not local.is_floating_point():
        kind = torch.uint8 if local.dtype == torch.bool else local.dtype
        return gather_sequence(local.to(kind), group).to(local.dtype)
    return gather_shares(local, group, stopwatch).transpose(0, 1).flatten(1, 2)


def joined(tensor: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, in whose backward each of `others` takes part with a gradient of zeros at least."""
    for other in others:
        tensor = tensor + other.flatten()[:0].sum().to(tensor.dtype)
    return tensor


def tokens_before(local: torch.Tensor, reach: int, shard: SequenceShard) -> torch.Tensor:
    """My tokens with those of the ranks before in front of them.

    Args:
        local (`torch.Tensor` of shape `(B, t, ...)`): mine.
        reach (`int`): how many tokens to put in front; shares may be shorter.
        shard ([`SequenceShard`]): of the rows.

    Returns:
        `torch.Tensor` of shape `(B, reach + t, ...)`; zero before the row begins.

    Communication: one all-gather of `min(reach, t)` tokens a rank, one reduce-scatter in the backward; none if one
        process holds the rows.
    Gradient: a token gets that of all ranks that saw it.
    """
    padding = [0, 0] * (local.dim() - 2) + [reach, 0]
    if shard.size == 1:
        return torch.nn.functional.pad(local, padding)
    kept = min(reach, local.shape[1])
    tails = gather_shares(local[:, local.shape[1] - kept :], shard.group, shard.stopwatch)
    before = tails[: shard.rank].transpose(0, 1).flatten(1, 2)[:, -reach:]
    padding[-2] = reach - before.shape[1]
    return joined(torch.cat([torch.nn.functional.pad(before, padding), local], dim=1), tails)


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, group, stopwatch):
        ctx.group, ctx.stopwatch = group, stopwatch
        local = local.contiguous()
        gathered = local.new_empty(place_in(group)[1], *local.shape)
        if not isinstance(group, ImaginaryRanks):
            with _measured(stopwatch, local.device):
                dist.all_gather(list(gathered.unbind()), local, group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        mine = torch.empty_like(grad[0], memory_format=torch.contiguous_format)
        parts = [part.contiguous() for part in grad.unbind()]
        if not isinstance(ctx.group, ImaginaryRanks):
            with _measured(ctx.stopwatch, grad.device):
                dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine, None, None


def _measured(stopwatch: Stopwatch | None, device: torch.device):
    return contextlib.nullcontext() if stopwatch is None else stopwatch.measure(device)

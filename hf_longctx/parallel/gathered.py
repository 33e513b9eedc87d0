"""What every rank of the `sp` axis computed about its own tokens, gathered with its gradient.

For layers that hand something on along the sequence: the last tokens of a convolution, the state of a recurrence.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .imaginary import ImaginaryRanks, place_in
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


def joined(tensor: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, in whose backward each of `others` takes part with a gradient of zeros at least."""
    for other in others:
        tensor = tensor + other.flatten()[:0].sum().to(tensor.dtype)
    return tensor


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

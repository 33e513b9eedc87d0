"""Autograd collectives over the `sp` axis, and two over `dp`, each with a stated backward.

Letters as everywhere: `B` rows, `N`/`K` query/key-value heads, `n`/`k` those of one rank, `T` tokens of the whole row,
`t = T/P` tokens of one rank, `H` head size. None of them scales a gradient: the wrapper's mean over ranks is the only
factor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .heads import HeadSplit
from .imaginary import ImaginaryRanks, place_in
from .stopwatch import Stopwatch


def sequence_to_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    split: HeadSplit,
    group: dist.ProcessGroup,
    stopwatch: Stopwatch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exchange tokens for heads, an all-to-all: from my tokens with all heads to all tokens with my heads.

    Args:
        query (`torch.Tensor` of shape `(B, N, t, H)`): my tokens, all query heads.
        key (`torch.Tensor` of shape `(B, K, t, H)`): my tokens, all key heads, not repeated.
        value (`torch.Tensor` of shape `(B, K, t, H_v)`): my tokens, all value heads; `H_v` may differ from `H`.
        split ([`HeadSplit`]): who owns which head.
        group (`ProcessGroup`): the `sp` axis.
        stopwatch ([`Stopwatch`], *optional*): times the collectives, forward and backward.

    Returns:
        tuple of `(B, n, T, H)`, `(B, k, T, H)` and `(B, k, T, H_v)`: my heads, tokens in rank order.

    Communication: one all-to-all. `(P-1)/P` of `query` leaves this rank, and each key/value head goes once to every
    rank that reads it.
    Gradient: the inverse all-to-all; a key/value head read by several ranks receives the sum of their gradients.
    Memory: one copy to send and one to receive.
    Source: DeepSpeed-Ulysses, https://huggingface.co/papers/2309.14509, section 3.
    """
    dtype = query.dtype
    if not dtype == key.dtype == value.dtype:
        # Widening is lossless, so one all-to-all serves all three and each is cast back to what the model produced.
        wide = torch.promote_types(torch.promote_types(dtype, key.dtype), value.dtype)
        outputs = _SequenceToHeads.apply(split, group, stopwatch, query.to(wide), key.to(wide), value.to(wide))
        return tuple(output.to(source.dtype) for output, source in zip(outputs, (query, key, value)))
    return _SequenceToHeads.apply(split, group, stopwatch, query, key, value)


def heads_to_sequence(
    output: torch.Tensor, split: HeadSplit, group: dist.ProcessGroup, stopwatch: Stopwatch | None = None
) -> torch.Tensor:
    """Exchange heads for tokens, the inverse all-to-all: from all tokens with my heads to my tokens with all heads.

    Args:
        output (`torch.Tensor` of shape `(B, T, n, H_v)`): what the inner kernel returned for my heads.
        split ([`HeadSplit`]): who owns which head.
        group (`ProcessGroup`): the `sp` axis.
        stopwatch ([`Stopwatch`], *optional*): times the collectives, forward and backward.

    Returns:
        `torch.Tensor` of shape `(B, t, N, H_v)`: my tokens, all heads in their global order.

    Communication: one all-to-all, `(P-1)/P` of `output` leaves this rank.
    Gradient: the inverse all-to-all, no scaling.
    Memory: one copy to send and one to receive.
    """
    return _HeadsToSequence.apply(split, group, stopwatch, output)


def gather_sequence(local: torch.Tensor, group: dist.ProcessGroup | None, dim: int = 1) -> torch.Tensor:
    """Concatenate every rank's tokens along `dim`, for looking at: the result carries no gradient.

    Args:
        local (`torch.Tensor`): my tokens; every rank passes the same shape.
        group (`ProcessGroup`, *optional*): the `sp` axis; `None` returns `local` detached.
        dim (`int`, *optional*, defaults to 1): the token dimension.

    Returns:
        `torch.Tensor`: `P` times longer along `dim`, the same on every rank.

    Communication: one all-gather.
    Gradient: none.
    """
    local = local.detach()
    if group is None:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def sum_over_sequence(partial: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Add up what every rank found in its own tokens (one shape on all), such as sums of documents' hidden states.

    Communication: one all-reduce forward, one backward; none where `group`, the `sp` axis, is `None`.
    Gradient: the sum of the ranks' gradients, no scaling. Every rank computes the same loss from the sum, and wrappers
        average over ranks, so the two factors of `P` cancel.
    """
    return partial if group is None else _SumOverSequence.apply(partial, group)


def gather_integers(value: int, group: dist.ProcessGroup | None) -> list[int]:
    """Every rank's `value`, in rank order. Communication: one all-gather of 8 bytes. Gradient: none."""
    if group is None:
        return [value]
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    mine = torch.tensor([value], dtype=torch.int64, device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts).tolist()


def gather_integer_rows(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Every rank's integers of one shape `S`, as `(ranks, *S)`. Communication: one all-gather. Gradient: none."""
    if group is None:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.stack(parts)


def gather_rows(
    columns: Sequence[torch.Tensor], counts: Sequence[int], group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """Bring the rows of all ranks together, for several tensors at once and any number of rows a rank.

    Args:
        columns (`Sequence[torch.Tensor]`): `C` tensors `(n, D)` of one dtype, my rows; `n` may differ between ranks.
        counts (`Sequence[int]`): `n` of every rank, in rank order, the same list on all of them.
        group (`ProcessGroup`, *optional*): the `dp` axis; `None` returns `columns` as they are.

    Returns:
        list of `C` tensors `(sum(counts), D)`, rows in rank order.

    Communication: one all-gather of all columns, padded to the longest rank; one reduce-scatter in the backward.
    Gradient: a row receives the sum of the gradients that all ranks computed for it, no scaling.
    Memory: twice the gathered rows while they arrive.
    """
    if group is None:
        return list(columns)
    return list(_GatherRows.apply(list(counts), group, *columns))


def mean_gradient(parameter: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`parameter` itself, for a parameter that no wrapper averages.

    Communication: none; one all-reduce of its gradient in the backward.
    Gradient: the mean over the ranks of `group`, the same on all of them, as a wrapper would make it.
    """
    return parameter if group is None else _MeanGradient.apply(parameter, group)


def _exchange(
    send: list[list[torch.Tensor]], receive_sizes: list[int], group: dist.ProcessGroup, stopwatch: Stopwatch | None
) -> list[torch.Tensor]:
    """Send the `j`-th list of tensors to rank `j`, flat and in order; return the flat tensor from each rank."""
    send_sizes = [sum(part.numel() for part in parts) for parts in send]
    buffer = send[0][0].new_empty(sum(send_sizes))
    offset = 0
    for part in (part for parts in send for part in parts):
        # Written straight into place: flattening a slice of heads first would copy it twice.
        buffer[offset : offset + part.numel()].view(part.shape).copy_(part)
        offset += part.numel()
    received = buffer.new_empty(sum(receive_sizes))
    if not isinstance(group, ImaginaryRanks):
        with contextlib.nullcontext() if stopwatch is None else stopwatch.measure(buffer.device):
            dist.all_to_all_single(received, buffer, receive_sizes, send_sizes, group=group)
    return list(received.split(receive_sizes))


class _SumOverSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, group):
        ctx.group = group
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, split: HeadSplit, group, stopwatch, *tensors):
        rank, size = place_in(group)
        ctx.split, ctx.group, ctx.stopwatch, ctx.rank, ctx.size = split, group, stopwatch, rank, size
        ctx.shapes = [tensor.shape for tensor in tensors]
        send = [[x[:, slice(*r[peer])] for x, r in zip(tensors, _ranges(split))] for peer in range(size)]
        shapes = [_with_heads(x.shape, r[rank]) for x, r in zip(tensors, _ranges(split))]
        chunk_sizes = [shape.numel() for shape in shapes]
        received = _exchange(send, [sum(chunk_sizes)] * size, group, stopwatch)
        pieces = [chunk.split(chunk_sizes) for chunk in received]
        return tuple(torch.cat([piece[i].view(shape) for piece in pieces], dim=2) for i, shape in enumerate(shapes))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        split, size = ctx.split, ctx.size
        tokens = grads[0].shape[2] // size
        send = [[g[:, :, peer * tokens : (peer + 1) * tokens] for g in grads] for peer in range(size)]
        shapes = [[_with_heads(s, r[peer]) for s, r in zip(ctx.shapes, _ranges(split))] for peer in range(size)]
        sizes = [[shape.numel() for shape in peer_shapes] for peer_shapes in shapes]
        received = _exchange(send, [sum(s) for s in sizes], ctx.group, ctx.stopwatch)
        pieces = [chunk.split(s) for chunk, s in zip(received, sizes)]
        outputs = []
        for i, ranges in enumerate(_ranges(split)):
            parts = [pieces[peer][i].view(shapes[peer][i]) for peer in range(size)]
            if sum(part.shape[1] for part in parts) == ctx.shapes[i][1]:
                outputs.append(torch.cat(parts, dim=1))
                continue
            total = grads[i].new_zeros(ctx.shapes[i])
            for head_range, part in zip(ranges, parts):
                total[:, slice(*head_range)] += part
            outputs.append(total)
        return None, None, None, *outputs


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, split: HeadSplit, group, stopwatch, output):
        rank, size = place_in(group)
        ctx.split, ctx.group, ctx.stopwatch, ctx.rank, ctx.size = split, group, stopwatch, rank, size
        rows, tokens, _, head_size = output.shape
        tokens //= size
        ctx.local_shape = (rows, tokens, split.query_count(rank), head_size)
        send = [[output[:, peer * tokens : (peer + 1) * tokens]] for peer in range(size)]
        shapes = [(rows, tokens, split.query_count(peer), head_size) for peer in range(size)]
        received = _exchange(send, [torch.Size(shape).numel() for shape in shapes], group, stopwatch)
        return torch.cat([chunk.view(shape) for chunk, shape in zip(received, shapes)], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        send = [[grad[:, :, slice(*ctx.split.query[peer])]] for peer in range(ctx.size)]
        received = _exchange(send, [torch.Size(ctx.local_shape).numel()] * ctx.size, ctx.group, ctx.stopwatch)
        return None, None, None, torch.cat([chunk.view(ctx.local_shape) for chunk in received], dim=1)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counts: list[int], group, *columns):
        ctx.counts, ctx.group, ctx.rank = counts, group, dist.get_rank(group)
        width, local = columns[0].shape[1], counts[ctx.rank]
        send = columns[0].new_zeros(len(columns), max(counts), width)
        for slot, column in zip(send, columns):
            slot[:local] = column
        parts = [torch.empty_like(send) for _ in counts]
        dist.all_gather(parts, send, group=group)
        return tuple(torch.cat([p[i, :n] for p, n in zip(parts, counts)]) for i in range(len(columns)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        send = [grads[0].new_zeros(len(grads), max(ctx.counts), grads[0].shape[1]) for _ in ctx.counts]
        for i, grad in enumerate(grads):
            for slot, part in zip(send, grad.split(ctx.counts)):
                slot[i, : len(part)] = part
        received = torch.empty_like(send[0])
        dist.reduce_scatter(received, send, group=ctx.group)
        return None, None, *received[:, : ctx.counts[ctx.rank]].unbind()


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, group):
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad.div_(dist.get_world_size(ctx.group)), None


def _ranges(split: HeadSplit):
    """Head ranges of query, key and value, in that order."""
    return split.query, split.key_value, split.key_value


def _with_heads(shape: torch.Size, head_range: tuple[int, int]) -> torch.Size:
    """The shape `(B, heads, t, H)` restricted to a range of heads."""
    return torch.Size((shape[0], head_range[1] - head_range[0], *shape[2:]))

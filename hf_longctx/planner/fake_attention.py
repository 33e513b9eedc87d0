"""Attention that computes nothing and holds what the real kernels hold. For simulations on fake tensors only.

What a flash kernel keeps for its backward is query, key, value, output and the log-sum-exp of every row of scores;
nothing is `T x T`, whatever the mask. Around it stand the buffers of the two exchanges of `"ulysses"`. The rank that
owns most heads is simulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..adapters.recurrent.pieces import SharePieces
from ..attention.deferred import deferred_mask
from ..attention.registry import AttentionEntry, name_that_packs, name_that_shards
from ..parallel.heads import HeadSplit, split_heads
from ..parallel.imaginary import ImaginaryRanks
from ..parallel.shard import SequenceShard
from .fake_hashing import HashedKernel


SHAPE_ONLY = "planned"


@dataclass(frozen=True, eq=False)
class PlannedRows(SequenceShard):
    """The facts of rows of one document each, which ranks that do not exist share. The last of them is simulated.

    Args:
        is_flash (`bool`): the kernel is a flash kernel on a GPU, whose backward has buffers of its own; otherwise that
            of a CPU, which has none to speak of.
        num_hashes (`int`, *optional*): rounds of LSH attention in its place.
    """

    is_flash: bool = True
    num_hashes: int | None = None

    @classmethod
    def of(cls, size: int, rows: int, local_len: int, is_flash: bool, num_hashes: int | None = None) -> PlannedRows:
        """Of `size` ranks, each with `local_len` tokens; made under the fake mode."""
        rank = size - 1
        ranks: Any = ImaginaryRanks(rank, size)
        planned = cls(size, rank, size * local_len, local_len, group=ranks, is_flash=is_flash, num_hashes=num_hashes)
        # Read from numbers elsewhere, which fake tensors do not have.
        documents = torch.zeros(rows, size * local_len, dtype=torch.int32)
        alone = SequenceShard(1, 0, size * local_len, size * local_len)
        planned.derived["whole"] = SharePieces(alone, documents, ((size * local_len,),) * rows, (False,) * rows)
        planned.derived["pieces"] = SharePieces(planned, documents, ((local_len,),) * rows, (size > 1,) * rows)
        return planned


def shape_only_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    sequence_shard: PlannedRows | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """What `"ulysses"` around a flash kernel would hold. Known as `"planned"`, during a simulation only.

    Args:
        query (`torch.Tensor` of shape `(B, N, t, H)`): of one rank; `key`, `value`: `(B, K, t, H)`.
        sequence_shard ([`PlannedRows`], *optional*): how many ranks share the rows.

    Returns:
        tuple of `(B, t, N, H_v)` and `None`.

    Raises:
        RuntimeError: the tensors are real.
    """
    if not isinstance(query, FakeTensor):
        raise RuntimeError(
            f"`attn_implementation` ('{SHAPE_ONLY}') computes nothing, it only plans memory: load the model with "
            f"{name_that_shards()!r} or {name_that_packs()!r} to train it."
        )
    rows = sequence_shard or PlannedRows(1, 0, query.shape[2], query.shape[2])
    if rows.num_hashes is not None:
        key = query[..., :0]  # LSH attention has none besides the queries
    if rows.size == 1:
        return _attend(rows, query, key, value), None
    split = split_heads(query.shape[1], key.shape[1], rows.size)
    rank = fullest_rank(split)
    query, key, value = _exchange_heads(split, rank, query, key, value)
    index = split.key_value_index(rank)
    if index is not None:
        chosen = torch.tensor(index, device=key.device)
        key, value = key.index_select(1, chosen), value.index_select(1, chosen)
    output = _attend(rows, query, key, value)
    shape = (output.shape[0], output.shape[1] // rows.size, split.num_query_heads, output.shape[3])
    return _ToTokens.apply(shape, output), None


# Not in the registry, by which trainers ask whether an attention is ours.
SHAPE_ONLY_ATTENTION = AttentionEntry(SHAPE_ONLY, shape_only_attention, deferred_mask)


def _attend(rows: PlannedRows, *tensors: torch.Tensor) -> torch.Tensor:
    """The kernel, in the precision that autocast gives it."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        tensors = tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    if rows.num_hashes is not None:
        return HashedKernel.apply(rows.num_hashes, tensors[0], tensors[2])
    return _Kernel.apply(rows.is_flash, *tensors)


def _exchange_heads(split: HeadSplit, rank: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All three travel in the widest precision among them, as in `sequence_to_heads`."""
    wide = max((x.dtype for x in tensors), key=lambda dtype: dtype.itemsize)
    outputs = _ToHeads.apply(split, rank, *(x.to(wide) for x in tensors))
    return tuple(output.to(x.dtype) for output, x in zip(outputs, tensors))


def fullest_rank(split: HeadSplit) -> int:
    """The rank whose heads take most memory."""

    def heads(rank: int) -> int:
        index = split.key_value_index(rank)
        return split.query_count(rank) + 2 * split.key_value_count(rank) + 2 * len(index or ())

    return max(range(len(split.query)), key=heads)


class _Kernel(torch.autograd.Function):
    """`(B, n, T, H)` to `(B, T, n, H_v)`."""

    @staticmethod
    def forward(ctx, is_flash: bool, query, key, value):
        rows, heads, tokens, _ = query.shape
        output = value.new_empty((rows, tokens, heads, value.shape[-1]))
        log_sums = query.new_empty((rows, tokens, heads), dtype=torch.float32)
        ctx.is_flash = is_flash
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, log_sums = ctx.saved_tensors
        held = []
        if ctx.is_flash:
            held.append(torch.empty_like(query, dtype=torch.float32))  # dQ is added up in fp32
            held.append(torch.empty_like(log_sums))  # the row sums of dO * O
            if query.shape[1] != key.shape[1]:  # dK and dV of every query head, before they are summed
                held += [query.new_empty((*query.shape[:3], x.shape[-1])) for x in (key, value)]
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _ToHeads(torch.autograd.Function):
    """The buffers of `sequence_to_heads` and of its backward: one to send, one received, and the result."""

    @staticmethod
    def forward(ctx, split: HeadSplit, rank: int, query, key, value):
        ctx.shapes = [x.shape for x in (query, key, value)]
        size = len(split.query)
        counts = [split.query_count(rank), split.key_value_count(rank), split.key_value_count(rank)]
        sent_kv = sum(split.key_value_count(r) for r in range(size))
        sent = sum(x[:, :1].numel() * n for x, n in zip((query, key, value), (query.shape[1], sent_kv, sent_kv)))
        shapes = [(x.shape[0], n, x.shape[2] * size, x.shape[3]) for x, n in zip((query, key, value), counts)]
        ctx.sent = sum(torch.Size(shape).numel() for shape in shapes)
        received = _exchange(query, sent, ctx.sent)
        outputs = tuple(received.new_empty(shape) for shape in shapes)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        received = _exchange(grads[0], ctx.sent, sum(shape.numel() for shape in ctx.shapes))
        return None, None, *(received.new_empty(shape) for shape in ctx.shapes)


class _ToTokens(torch.autograd.Function):
    """The buffers of `heads_to_sequence` and of its backward."""

    @staticmethod
    def forward(ctx, shape: tuple[int, ...], output):
        ctx.shape, ctx.numel = output.shape, torch.Size(shape).numel()
        return _exchange(output, output.numel(), ctx.numel).new_empty(shape)

    @staticmethod
    def backward(ctx, grad):
        return None, _exchange(grad, ctx.numel, ctx.shape.numel()).new_empty(ctx.shape)


def _exchange(like: torch.Tensor, sent: int, received: int) -> torch.Tensor:
    """What came in; the send buffer is alive next to it until then."""
    outgoing = like.new_empty(sent)
    incoming = outgoing.new_empty(received)
    return incoming

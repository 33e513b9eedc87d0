"""Recurrences whose state only decays, on rows that several ranks share: what comes in, and what it adds.

What: Mamba, lightning attention and RG-LRU hold a state `h_t = a_t * h_{t-1} + u_t` whose decay `a_t` multiplies
number by number. What a rank's tokens make of a state that comes in is therefore that state times all decays so far,
next to what they make of none. transformers' own function computes the latter, with the state that it ends with.

How: every rank gathers the final states of all ranks and their decays over a whole share, and runs the recurrence over
ranks, which is one multiplication and one sum each. The layer adds what the incoming state gives to each token.

Price a layer: one all-gather of the state and its decay, whatever the number of tokens; the reduce-scatter of their
gradient in the backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...parallel.gathered import gather_shares
from .pieces import SharePieces


def incoming_state(pieces: SharePieces, state: torch.Tensor, decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that enters the first token of this rank.

    Args:
        pieces ([`SharePieces`]): of rows that ranks share.
        state (`torch.Tensor` of shape `(B, ...)`): after my tokens, if none had come in.
        decay (`torch.Tensor` of shape `(B, ...)`, broadcastable to `state`): the product of the decays of my tokens.
            Counts only in rows without a document bound, since a state ends with its document.

    Returns:
        tuple of the state, of the same shape, zero on the first rank, and of what was gathered, which must take part
        in the backward of every rank: see [`joined`][hf_longctx.parallel.gathered.joined].

    Communication: one all-gather forward, one reduce-scatter backward.
    """
    shard, rows = pieces.shard, len(state)
    passes = torch.tensor(pieces.passes_through, device=state.device).view(rows, *[1] * (decay.dim() - 1))
    decay = torch.where(passes, decay.to(state.dtype), 0)
    packed = torch.cat([state.flatten(1), decay.flatten(1)], dim=1)
    gathered = gather_shares(packed, shard.group, shard.stopwatch)
    incoming = torch.zeros_like(state)
    for rank in range(shard.rank):
        theirs, decayed = gathered[rank].split([state[0].numel(), decay[0].numel()], dim=1)
        incoming = incoming * decayed.view_as(decay) + theirs.view_as(state)
    return incoming, gathered


def add_where_continued(pieces: SharePieces, outputs: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """`outputs` of shape `(B, t, ...)` plus what the incoming state gives to the tokens that it reaches."""
    reached = pieces.continued_tokens
    reached = reached.view(*reached.shape, *[1] * (outputs.dim() - 2))
    return outputs + torch.where(reached, added, 0).to(outputs.dtype)


def no_fused_kernel(original: Callable, pieces: SharePieces, *args: object, **kwargs: object) -> None:
    """What transformers' fused functions answer without their kernel, so that the layer takes its steps one by one."""


_DIFFERENTIABLE: dict[tuple[Callable, str], bool] = {}


def has_state_gradient(
    original: Callable, run: Callable[..., tuple[torch.Tensor, torch.Tensor]], *tensors: torch.Tensor
) -> bool:
    """Whether the final state that a kernel returns has a gradient; asked once a kernel and kind of device.

    Args:
        original (`Callable`): the function that may be a kernel.
        run (`Callable`): from tensors of shape `(B, t, ...)` to outputs and final state.
        tensors (`torch.Tensor`): its inputs, of which the first tokens are taken; the first one is the input of the
            recurrence.
    """
    key = (original, tensors[0].device.type)
    if key not in _DIFFERENTIABLE:
        first = [tensor[:1, :2].detach() for tensor in tensors]
        first[0] = torch.ones_like(first[0]).requires_grad_()
        keep = lambda tensor: tensor  # not the hooks of a checkpoint around this layer, which counts what is saved
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
            state = run(*first)[1]
            found = torch.autograd.grad(state.sum(), first[0], allow_unused=True) if state.requires_grad else (None,)
        _DIFFERENTIABLE[key] = found[0] is not None and bool(found[0].any())
    return _DIFFERENTIABLE[key]

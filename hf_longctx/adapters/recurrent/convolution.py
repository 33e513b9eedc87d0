"""A causal depthwise convolution over rows that several ranks share, and over packed documents.

What: `causal_conv1d_fn` of transformers' recurrent layers looks at `kernel - 1` tokens before each one. Those at the
beginning of a share are on the ranks before (the halo), and those at the beginning of a document must see zeros.

How: every rank gathers the last tokens of all ranks, so that shares shorter than the kernel work too, puts the halo in
front of its own tokens and calls transformers' function once. The first `kernel - 1` tokens of each document are then
computed again, all of them in one call, with zeros in front.

Price a layer: one all-gather of `B x channels x (kernel - 1)` numbers a rank, its reduce-scatter in the backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...parallel.gathered import gather_shares, joined
from .pieces import SharePieces


def convolve(
    original: Callable,
    pieces: SharePieces,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **dropped: object,
) -> torch.Tensor:
    """transformers' `causal_conv1d_fn` on a rank's tokens of whole rows.

    Args:
        original (`Callable`): transformers' function.
        pieces ([`SharePieces`]): where documents begin.
        hidden_states (`torch.Tensor` of shape `(B, channels, t)`): my tokens.
        weight (`torch.Tensor` of shape `(channels, kernel)`); bias (`(channels,)`, *optional*); activation (`str`,
            *optional*): of the layer.
        dropped: bounds of documents, which `pieces` has read.

    Returns:
        `torch.Tensor` of shape `(B, channels, t)`.

    Communication: one all-gather forward, one reduce-scatter backward, where ranks share the rows.
    Gradient: equal to the whole rows', restricted to my tokens; the weight's is a sum over ranks.
    """
    reach = weight.shape[-1] - 1
    run = lambda inputs: original(inputs, weight, bias, activation=activation)
    if reach == 0:
        return run(hidden_states)
    if not pieces.is_shared:
        return _redo_beginnings(run, pieces, hidden_states, run(hidden_states), reach)
    halo, tails = _halo(pieces, hidden_states, reach)
    outputs = run(torch.cat([halo, hidden_states], dim=-1))[..., reach:]
    return joined(_redo_beginnings(run, pieces, hidden_states, outputs, reach), tails)


def _halo(pieces: SharePieces, hidden_states: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `reach` tokens before mine, zero where they are of another document; and what was gathered for them."""
    shard, tokens = pieces.shard, hidden_states.shape[-1]
    kept = min(tokens, reach)
    tails = gather_shares(hidden_states[..., tokens - kept :], shard.group, shard.stopwatch)
    before = tails[: shard.rank].movedim(0, -2).flatten(-2)[..., -reach:]
    before = torch.nn.functional.pad(before, (reach - before.shape[-1], 0))
    start = shard.rank * shard.local_len
    index = torch.arange(start - reach, start, device=hidden_states.device)
    same = pieces.documents[:, index.clamp(min=0)] == pieces.documents[:, start, None]
    return torch.where((same & (index >= 0))[:, None], before, before.new_zeros(())), tails


def _redo_beginnings(
    run: Callable, pieces: SharePieces, hidden_states: torch.Tensor, outputs: torch.Tensor, reach: int
) -> torch.Tensor:
    """Outputs in which the first tokens of each document that begins inside a row see nothing before it."""
    places = _beginnings(pieces, reach, hidden_states.device)
    if places is None:
        return outputs
    index, is_token = places
    flat = hidden_states.transpose(1, 2).flatten(0, 1)
    beginnings = torch.where(is_token[..., None], flat[index], flat.new_zeros(()))
    alone = run(beginnings.transpose(1, 2)).transpose(1, 2)
    result = outputs.transpose(1, 2).flatten(0, 1).index_put((index[is_token],), alone[is_token])
    return result.view(len(hidden_states), -1, hidden_states.shape[1]).transpose(1, 2)


def _beginnings(pieces: SharePieces, reach: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Flat indices `(documents, reach)` of the first tokens of documents, and which of them are tokens of it."""
    starts, sizes, place = [], [], 0
    for row in pieces.lengths:
        for number, length in enumerate(row):
            # The first piece of a row has nothing before it, or the halo.
            if number:
                starts.append(place)
                sizes.append(length)
            place += length
    if not starts:
        return None
    steps = torch.arange(reach)
    is_token = steps < torch.tensor(sizes)[:, None]
    index = torch.where(is_token, torch.tensor(starts)[:, None] + steps, 0)
    return index.to(device), is_token.to(device)

"""Mamba on rows that several ranks share, and on packed documents: `mamba_selective_scan` of transformers.

The decay is a number for every channel, state and token, so what an incoming state adds is computed block by block and
again in the backward, or it would take as much memory as the states of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, silu, softplus
from torch.utils.checkpoint import checkpoint

from ...parallel.gathered import joined
from .pieces import SharePieces, run_pieces
from .scan import add_where_continued, has_state_gradient, incoming_state


_BLOCK = 256  # tokens whose decays are in memory at once


def selective_scan(
    original: Callable,
    pieces: SharePieces,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **settings: Any,
) -> torch.Tensor:
    """transformers' `mamba_selective_scan` on a rank's tokens of whole rows.

    Args:
        original (`Callable`): transformers' function.
        pieces ([`SharePieces`]): where documents begin.
        hidden_states, dt, z (`torch.Tensor` of shape `(B, channels, t)`): my tokens; `z` gates the outputs.
        A (`(channels, state)`); B and C (`(B, state, t)`); D and delta_bias (`(channels,)`): of the layer.
        delta_softplus (`bool`): of the layer.
        return_last_state (`bool`): for a cache, of which there is none.
        settings: how transformers runs the scan.

    Returns:
        `torch.Tensor` of shape `(B, channels, t)`.

    Communication: one all-gather of `2 x B x channels x state` numbers, one reduce-scatter backward, where ranks share
        the rows.
    Gradient: equal to the whole rows', restricted to my tokens.
    """
    is_shared = pieces.is_shared
    options = dict(D=D, delta_bias=delta_bias, delta_softplus=delta_softplus, **settings)

    def run(*tensors):
        x, dt, B, C, *gate = (tensor.transpose(1, 2) for tensor in tensors)
        given = {**options, "z": gate[0] if gate else None}
        if not is_shared:
            return original(x, dt, A, B, C, **given).transpose(1, 2), None
        outputs, state = original(x, dt, A, B, C, return_last_state=True, **given)
        return outputs.transpose(1, 2), state

    inputs = [tensor.transpose(1, 2) for tensor in (hidden_states, dt, B, C)]
    if not is_shared:
        gates = [] if z is None else [z.transpose(1, 2)]
        return run_pieces(pieces, run, *inputs, *gates)[0].transpose(1, 2)
    # The gate comes after what an incoming state adds.
    if torch.is_grad_enabled() and not has_state_gradient(original, run, *inputs):
        run = _reading_state(original, A, options)
    outputs, state = run_pieces(pieces, run, *inputs)
    assert state is not None
    steps = inputs[1] if delta_bias is None else inputs[1] + delta_bias.to(dt.dtype)
    steps = softplus(steps) if delta_softplus else steps
    time = steps.to(torch.promote_types(steps.dtype, A.dtype)).cumsum(dim=1)
    incoming, gathered = incoming_state(pieces, state, (time[:, -1, :, None] * A).exp())
    if pieces.shard.rank:
        outputs = add_where_continued(pieces, outputs, _read_all(incoming, time, A, inputs[3]))
    outputs = joined(outputs, gathered).transpose(1, 2)
    return outputs if z is None else outputs * silu(z)


def _read_all(incoming: torch.Tensor, time: torch.Tensor, A: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """What every token reads of the incoming state, of shape `(B, t, channels)`."""
    if time.shape[1] <= _BLOCK:
        return _read(incoming, time, A, C)
    blocks = zip(time.split(_BLOCK, dim=1), C.split(_BLOCK, dim=1))
    kept = dict(use_reentrant=False, preserve_rng_state=False)
    return torch.cat([checkpoint(_read, incoming, past, A, part, **kept) for past, part in blocks], dim=1)


def _read(incoming: torch.Tensor, time: torch.Tensor, A: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    states = incoming[:, None] * (time[..., None] * A).exp()
    return (states @ C.to(states.dtype)[..., None]).squeeze(-1)


def _reading_state(original: Callable, A: torch.Tensor, options: dict[str, Any]) -> Callable:
    """A scan whose final state is read by tokens of no step behind the others, since a kernel returns it detached.

    Such a token leaves the state as it is, and its `C` of one 1 reads one number of it for every channel.
    """
    bias, activates = options["delta_bias"], options["delta_softplus"]
    given = {**options, "delta_bias": None, "delta_softplus": False}

    def run(x, dt, B, C):
        size, tokens = A.shape[-1], x.shape[1]
        dt = dt if bias is None else dt + bias.to(dt.dtype)
        dt = softplus(dt) if activates else dt
        x, dt, B, C = (pad(tensor.float(), (0, 0, 0, size)) for tensor in (x, dt, B, C))
        C = torch.cat([C[:, :tokens], torch.eye(size, dtype=C.dtype, device=C.device).expand(len(C), -1, -1)], dim=1)
        outputs = original(*(tensor.transpose(1, 2) for tensor in (x, dt)), A, B.mT, C.mT, **given)
        return outputs[..., :tokens].transpose(1, 2), outputs[..., tokens:]

    return run

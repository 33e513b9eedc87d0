"""Mamba2 on rows that several ranks share, and on packed documents: `mamba2_chunk_scan` of transformers.

The decay is one number a head and token, so an incoming state costs one product of a token's `C` with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import softplus

from ...parallel.gathered import joined
from .pieces import SharePieces, run_pieces
from .scan import add_where_continued, has_state_gradient, incoming_state


# What the layers pass on and this function answers itself: bounds of documents, a cache, a gate that none of them has.
_ANSWERED = ("seq_idx", "cu_seqlens", "cu_seq_lens_q", "initial_states", "return_final_states", "z")


def chunk_scan(
    original: Callable,
    pieces: SharePieces,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    **settings: Any,
) -> torch.Tensor:
    """transformers' `mamba2_chunk_scan` on a rank's tokens of whole rows.

    Args:
        original (`Callable`): transformers' function.
        pieces ([`SharePieces`]): where documents begin.
        hidden_states (`torch.Tensor` of shape `(B, t, heads, head_dim)`): my tokens.
        dt (`(B, t, heads)`); A (`(heads,)`); B and C (`(B, t, groups, state)`): of the layer.
        chunk_size (`int`): of the layer.
        settings: `D`, `dt_bias`, `dt_softplus`, `dt_limit` of the layer, and bounds, which `pieces` has read.

    Returns:
        `torch.Tensor` of shape `(B, t, heads, head_dim)`.

    Raises:
        NotImplementedError: the final state of the kernel that is installed has no gradient.

    Communication: one all-gather of `B x heads x (head_dim x state + 1)` numbers, one reduce-scatter backward, where
        ranks share the rows.
    Gradient: equal to the whole rows', restricted to my tokens.
    """
    options = {name: value for name, value in settings.items() if name not in _ANSWERED}
    is_shared = pieces.is_shared

    def run(x, dt, B, C):
        result = original(x, dt, A, B, C, chunk_size, return_final_states=is_shared, **options)
        return result if is_shared else (result, None)

    if is_shared and torch.is_grad_enabled() and not has_state_gradient(original, run, hidden_states, dt, B, C):
        raise NotImplementedError(
            f"the kernel that is installed for `{getattr(original, '__name__', original)}` returns a final state "
            f"without a gradient, which the {pieces.shard.size} ranks of a row hand on: remove its package, so that "
            "transformers uses PyTorch, or set `sequence_parallel_size` to 1."
        )
    outputs, state = run_pieces(pieces, run, hidden_states, dt, B, C)
    if state is None:
        return outputs
    log_decay = (_steps(dt, **options).to(state.dtype) * A.to(state.dtype)).cumsum(dim=1)
    incoming, gathered = incoming_state(pieces, state, log_decay[:, -1].exp()[..., None, None])
    if pieces.shard.rank:
        groups = incoming.unflatten(1, (B.shape[2], -1))
        read = torch.einsum("btgn,bghpn->btghp", C.to(state.dtype), groups).flatten(2, 3)
        outputs = add_where_continued(pieces, outputs, read * log_decay.exp()[..., None])
    return joined(outputs, gathered)


def _steps(
    dt: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: object,
) -> torch.Tensor:
    """The step of every token, as transformers computes it."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    return (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

"""Lightning attention of MiniMax on rows that several ranks share, and on packed documents.

transformers' loop over blocks stands inside the layer's forward and ends in a norm, so this is that forward in pieces:
its projections, the recurrence `S_t = exp(-slope) * S_{t-1} + k_t v_t`, its norm, gate and output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...parallel.gathered import joined
from ..pass_shard import ForwardRows
from .pieces import SharePieces, run_pieces
from .reader import RecurrentReader
from .scan import add_where_continued, incoming_state


class LightningPatch(RecurrentReader):
    """`MiniMaxLightningAttention` on pieces of documents."""

    def follow(
        self, module: torch.nn.Module, own: Callable, pieces: SharePieces, rows: ForwardRows, given: dict[str, Any]
    ) -> tuple[torch.Tensor, None]:
        layer: Any = module
        hidden_states, mask = given["hidden_states"], given.get("attention_mask")
        projected = layer.act_fn(layer.qkv_proj(hidden_states))
        if mask is not None:
            projected = (projected * mask[:, :, None]).to(projected.dtype)
        heads = projected.unflatten(-1, (layer.num_attention_heads, 3 * layer.head_dim))
        query, key, value = heads.split(layer.head_dim, dim=-1)
        outputs = linear_attention(pieces, query, key, value, layer.slope_rate, layer.block_size)
        outputs = layer.norm(outputs.flatten(2))
        outputs = torch.sigmoid(layer.output_gate(hidden_states)) * outputs
        return layer.out_proj(outputs), None


def linear_attention(
    pieces: SharePieces,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slope: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Attention without softmax whose keys decay by `exp(-slope)` a token, on a rank's tokens of whole rows.

    Args:
        pieces ([`SharePieces`]): where documents begin.
        query, key, value (`torch.Tensor` of shape `(B, t, heads, head_dim)`): my tokens.
        slope (`torch.Tensor` of shape `(heads, 1, 1)`): of the layer.
        block_size (`int`): tokens that attend to each other directly.

    Returns:
        `torch.Tensor` of shape `(B, t, heads, head_dim)`.

    Communication: one all-gather of `B x heads x (head_dim^2 + 1)` numbers, one reduce-scatter backward, where ranks
        share the rows.
    """
    run = lambda query, key, value: _run_blocks(query, key, value, slope, block_size)
    outputs, state = run_pieces(pieces, run, query, key, value)
    if not pieces.is_shared:
        return outputs
    assert state is not None
    tokens = query.shape[1]
    decay = (-slope * tokens).exp().to(state.dtype).expand(len(state), -1, -1, -1)
    incoming, gathered = incoming_state(pieces, state, decay)
    if pieces.shard.rank:
        past = torch.arange(1, tokens + 1, device=slope.device)[:, None]
        read = (query.transpose(1, 2) * (-slope * past).exp()) @ incoming
        outputs = add_where_continued(pieces, outputs, read.transpose(1, 2))
    return joined(outputs, gathered)


def _run_blocks(query, key, value, slope: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one document each, `(n, L, heads, head_dim)`: their outputs and the state after them."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    state = value.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    for q, k, v in zip(*(tensor.split(block_size, dim=2) for tensor in (query, key, value))):
        past = torch.arange(1, q.shape[2] + 1, device=slope.device)[:, None]
        distance = past - past.T
        decay = torch.where(distance >= 0, (-slope * distance.clamp(min=0)).exp(), 0)
        outputs.append((q * (-slope * past).exp()) @ state + ((q @ k.mT) * decay) @ v)
        state = state * (-slope * q.shape[2]).exp() + (k * (-slope * (q.shape[2] - past)).exp()).mT @ v
    return torch.cat(outputs, dim=2).transpose(1, 2), state

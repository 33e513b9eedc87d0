"""Gated delta rule and Kimi delta attention (KDA) on rows that several ranks share, and on packed documents.

What: both keep a matrix a head that every token updates. Ranks exchange one of two things, whichever is less to send
([`delta_exchange`][hf_longctx.adapters.recurrent.delta_exchange] chooses):

- states: the state after my tokens is affine in the one before them, `state = own + transition @ incoming`, and what a
  token reads of the incoming one is linear in it. One call of transformers' function gives all of them: zeros are
  appended to the values, and the initial state is `[0 | I]`. Ranks gather `[own | transition]` and each adds up those
  before it. Any function will do whose final state has a gradient; the initial state needs none.
- heads: ranks trade tokens for heads, as attention does, and run whole rows of some heads.

Documents are run one by one, those of equal length in one call. A state never passes a bound: it is cut, since a large
negative decay would lose digits.

Price of states: ranks after the first compute values that are wider by a key. Of heads: all tokens travel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ...parallel.collectives import heads_to_sequence, sequence_to_heads
from ...parallel.gathered import gather_shares, joined
from ...parallel.heads import split_heads
from ...parallel.imaginary import ImaginaryRanks
from .delta_exchange import HEADS, DeltaSizes, choose_exchange, plan_of, state_has_gradient
from .pieces import SharePieces, pieces_of_whole_rows, run_pieces


# What transformers passes on to its function; all else is bounds of documents, which `pieces` has read.
_SETTINGS = ("chunk_size", "use_qk_l2norm_in_kernel")


def delta_rule(
    original: Callable,
    pieces: SharePieces,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    exchange: str | None = None,
    **given: object,
) -> tuple[torch.Tensor, None]:
    """transformers' `torch_chunk_gated_delta_rule` or `chunk_kimi_delta_attention` on a rank's tokens of whole rows.

    Args:
        original (`Callable`): transformers' function.
        pieces ([`SharePieces`]): where documents begin.
        query, key (`torch.Tensor` of shape `(B, t, K_heads, K)`): my tokens.
        value (`torch.Tensor` of shape `(B, t, heads, V)`): my tokens; `heads` is a multiple of `K_heads`.
        g (`torch.Tensor` of shape `(B, t, heads)`, or `(B, t, heads, K)` of KDA): logarithms of decays.
        beta (`torch.Tensor` of shape `(B, t, heads)`): strengths of the updates.
        exchange (`str`, *optional*): `"heads"` or `"states"`; unset, what sends less.
        given: settings of the function. There is no cache in training, so the rows begin without a state.

    Returns:
        tuple of `torch.Tensor` of shape `(B, t, heads, V)`, and `None` for the state.

    Communication: states: one all-gather of `B x heads x K x (V + K)` numbers a rank, one reduce-scatter backward.
    Heads: two or three all-to-alls, and as many backward.
    Gradient: equal to the whole rows', restricted to my tokens; a weight's is a sum over ranks.
    """
    function = functools.partial(original, **{name: given[name] for name in _SETTINGS if name in given})
    tensors, name = (query, key, value, g, beta), getattr(original, "__name__", type(original).__name__)
    if not pieces.is_shared:
        return run_pieces(pieces, lambda *parts: _call(function, *parts), *tensors)[0], None
    sizes = DeltaSizes.of(pieces.shard.size, *tensors)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    # A plan computes no numbers, by which a run in the same process may ask later.
    is_planned = isinstance(pieces.shard.group, ImaginaryRanks)
    hands_on = (
        not needs_gradient
        or is_planned
        or state_has_gradient(original, *sizes.of_one_row(), value.dtype, value.device)
    )
    way = choose_exchange(sizes, hands_on, exchange, name)
    pieces.shard.layer_plans.setdefault((name, way), functools.partial(plan_of, pieces, name, sizes, way))
    run = _trade_heads if way == HEADS else _pass_states
    return run(function, pieces, *tensors), None


def _call(function: Callable, query, key, value, g, beta) -> tuple[torch.Tensor, None]:
    return function(query, key, value, g=g, beta=beta, initial_state=None, output_final_state=False)[0], None


def _pass_states(function: Callable, pieces: SharePieces, query, key, value, g, beta) -> torch.Tensor:
    """The outputs of my tokens, by handing states on."""
    shard, width, reads = pieces.shard, value.shape[-1], any(pieces.continues)

    def run(query, key, value, g, beta):
        initial = None
        if reads:  # values `[v | 0]` and a state `[0 | I]`: what is appended is what the incoming state becomes
            rows, heads, keys = len(value), value.shape[2], key.shape[-1]
            value = torch.nn.functional.pad(value, (0, keys))
            initial = torch.eye(keys, device=value.device).expand(rows, heads, keys, keys)
            initial = torch.nn.functional.pad(initial, (width, 0)).contiguous()
        return function(query, key, value, g=g, beta=beta, initial_state=initial, output_final_state=True)

    outputs, state = run_pieces(pieces, run, query, key, value, g, beta)
    gathered = gather_shares(_handed_on(pieces, state, width, key), shard.group, shard.stopwatch)
    if reads:
        outputs = _add_incoming(pieces, outputs, _incoming(gathered[: shard.rank], width), width)
    return joined(outputs, gathered)


def _handed_on(pieces: SharePieces, state: torch.Tensor, width: int, key: torch.Tensor) -> torch.Tensor:
    """`[own | transition]` of each row, `(B, heads, K, V + K)`; a document that begins here ends the transition."""
    keys = state.shape[-2]
    if pieces.shard.rank == pieces.shard.size - 1:  # for nobody; it only takes part in the backward
        return joined(state.new_zeros(*state.shape[:-1], width + keys), key)
    if state.shape[-1] == width:
        return torch.nn.functional.pad(state, (0, keys))
    own, transition = state.split((width, keys), dim=-1)
    passes = torch.tensor(pieces.passes_through, device=state.device)[:, None, None, None]
    return torch.cat([own, torch.where(passes, transition, transition.new_zeros(()))], dim=-1)


def _incoming(before: torch.Tensor, width: int) -> torch.Tensor:
    """The state after all ranks before mine, `(B, heads, K, V)`, from what each of them handed on."""
    incoming = before[0, ..., :width]
    with torch.autocast(before.device.type, enabled=False):
        for part in before[1:]:
            own, transition = part.split((width, part.shape[-1] - width), dim=-1)
            incoming = own + transition @ incoming
    return incoming


def _add_incoming(pieces: SharePieces, outputs: torch.Tensor, incoming: torch.Tensor, width: int) -> torch.Tensor:
    """Outputs with what my tokens read of the incoming state, where they are of the same document."""
    output, reading = outputs.split((width, outputs.shape[-1] - width), dim=-1)
    with torch.autocast(outputs.device.type, enabled=False):
        read = (reading.transpose(1, 2).to(incoming.dtype) @ incoming).transpose(1, 2)
    continued = pieces.continued_tokens[..., None, None]
    return (output + torch.where(continued, read, read.new_zeros(()))).to(output.dtype)


def _trade_heads(function: Callable, pieces: SharePieces, query, key, value, g, beta) -> torch.Tensor:
    """The outputs of my tokens, by running whole rows of some heads."""
    shard = pieces.shard
    split = split_heads(value.shape[2], key.shape[2], shard.size)
    whole = _whole_rows_of_my_heads(split, pieces, query, key, value, g, beta)
    output, _ = run_pieces(pieces_of_whole_rows(pieces), lambda *parts: _call(function, *parts), *whole)
    fill = shard.size * shard.local_len - shard.num_tokens
    output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, fill))
    return heads_to_sequence(output, split, shard.group, shard.stopwatch)


def _whole_rows_of_my_heads(split, pieces: SharePieces, query, key, value, g, beta) -> list[torch.Tensor]:
    """`query`, `key`, `value`, `g` and `beta` of all `T` tokens and my heads, the fill cut off."""
    shard, widths = pieces.shard, [value.shape[-1]]
    exchange = functools.partial(sequence_to_heads, split=split, group=shard.group, stopwatch=shard.stopwatch)
    decay = g if g.dim() == 4 else g[..., None]
    sides = {"g": decay, "beta": beta[..., None]}
    # What has another precision than the values travels by itself: widening all of it would double their bytes.
    along = [name for name, side in sides.items() if side.dtype == value.dtype]
    alone = [name for name in sides if name not in along]
    widths += [sides[name].shape[-1] for name in along]
    values = torch.cat([value, *(sides[name] for name in along)], dim=-1)
    values, query, key = exchange(*(tensor.transpose(1, 2) for tensor in (values, query, key)))
    value, *parts = values.split(widths, dim=-1)
    found = dict(zip(along, parts))
    if alone:
        other = torch.cat([sides[name] for name in alone], dim=-1).transpose(1, 2)
        nothing = other[:, : split.num_key_value_heads, :, :0]
        other = exchange(other, nothing, nothing)[0]
        found |= dict(zip(alone, other.split([sides[name].shape[-1] for name in alone], dim=-1)))
    index = split.key_value_index(shard.rank)
    if index is not None:  # my heads do not group evenly over the key heads that they read
        query, key = query[:, list(index)], key[:, list(index)]
    rows = [tensor.transpose(1, 2)[:, : shard.num_tokens] for tensor in (query, key, value, found["g"], found["beta"])]
    return [*rows[:3], rows[3] if g.dim() == 4 else rows[3][..., 0], rows[4][..., 0]]

"""Attention to picked keys, and to windows and entries, against dense attention under a mask."""

from __future__ import annotations

import pytest
import torch

from hf_longctx.attention.call import AttentionCall
from hf_longctx.attention.drawn_dropout import drop_weights
from hf_longctx.attention.indexed import RowVisibility, attend_indexed
from hf_longctx.attention.packed import PACKED


B, K, N, T, H, HV, PICKED = 2, 2, 6, 23, 8, 5, 4
SEGMENTS = torch.tensor([[0] * 5 + [1] * 18, [0] * 11 + [1] * 2 + [2] * 6 + [-1] * 4])


def make_call(start: int, tokens: int, heads: int = K, dropout: float = 0.0) -> AttentionCall:
    torch.manual_seed(0)
    query, key = torch.randn(B, N, T, H), torch.randn(B, heads, T, H)
    value, sinks = torch.randn(B, heads, T, HV), torch.randn(N)
    tensors = [x.double().requires_grad_() for x in (query[:, :, start : start + tokens], key, value, sinks)]
    query, key, value, sinks = tensors
    extras = {"per_head": {"s_aux": sinks}, "scaling": 0.7, "dropout": dropout}
    return AttentionCall(PACKED, torch.nn.Identity(), query, key, value, **extras)


def make_picks(start: int, tokens: int, heads: int | None) -> torch.Tensor:
    """Distinct keys, forbidden ones and future ones among them, and -1."""
    shape = (B, tokens, T) if heads is None else (B, heads, tokens, T)
    picks = torch.rand(shape, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :PICKED]
    picks[..., start % 3 :: 3, -1] = -1
    return picks


def dense(call: AttentionCall, picks: torch.Tensor, start: int, segments) -> torch.Tensor:
    """The obvious way: all scores, under a mask."""
    query, key, value = call.query, call.key, call.value
    group, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    picks = picks[:, None] if picks.dim() == 3 else picks
    seen = torch.zeros(*picks.shape[:3], T + 1, dtype=torch.bool).scatter(-1, picks.masked_fill(picks < 0, T), True)
    seen = seen[..., :T].repeat_interleave(query.shape[1] // seen.shape[1], 1)
    places = torch.arange(start, start + tokens)
    seen = seen & (torch.arange(T) <= places[:, None])
    if segments is not None:
        mine = segments[:, places, None]
        seen = seen & ((mine == segments[:, None]) & (mine != -1))[:, None]
    scores = (query @ key.transpose(-1, -2) * 0.7).masked_fill(~seen, -1e30)
    sinks = call.per_head["s_aux"].view(1, -1, 1, 1).expand(B, -1, tokens, 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :T]
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("heads", [None, K], ids=["all heads alike", "each key head"])
@pytest.mark.parametrize(("start", "tokens", "block"), [(0, T, 128), (0, T, 5), (9, 8, 3), (22, 1, 5)])
def test_picked_keys_equal_a_dense_mask(segments, heads, start, tokens, block, monkeypatch):
    if block == 5:
        monkeypatch.setattr("hf_longctx.attention.indexed.NUMBERS_AT_ONCE", 1)  # one key head at a time
    call, picks = make_call(start, tokens), make_picks(start, tokens, heads)
    inputs = call.query, call.key, call.value, call.per_head["s_aux"]
    expected = dense(call, picks, start, segments)
    actual = attend_indexed(call, picks, RowVisibility(T, start, segments), block)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((outputs * weights).sum(), inputs) for outputs in (actual, expected)]
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    call = make_call(0, T)
    output = attend_indexed(call, torch.full((B, T, 2), -1), RowVisibility(T, 0, None))
    assert not output.any()
    gradient = torch.autograd.grad(output.sum(), call.value)[0]
    assert not gradient.any()


def test_dropout_is_the_same_in_every_block_and_share():
    """And in the recomputation: the gradient is that of what the forward dropped."""
    picks, outputs = make_picks(0, T, None), []
    for block, start, tokens in ((128, 0, T), (5, 0, T), (5, 9, 8)):
        torch.manual_seed(3)
        call = make_call(start, tokens, dropout=0.4)
        torch.manual_seed(3)
        outputs.append(attend_indexed(call, picks[:, start : start + tokens], RowVisibility(T, start, None), block))
        gradient = torch.autograd.grad(outputs[-1].sum(), call.value)[0]
        # Outputs are linear in the values, so the gradient with the values gives the outputs again.
        torch.testing.assert_close((gradient * call.value).sum(), outputs[-1].sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outputs[0][:, 9:17], outputs[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropped_weights_are_as_many_as_asked_and_keep_the_mean(dropout):
    rows, keys = torch.arange(64)[:, None], torch.arange(4096)
    dropped = drop_weights(torch.ones(64, 4096), dropout, 5, rows, keys)
    # 2**18 draws: four standard deviations are below 0.004.
    assert abs((dropped == 0).double().mean() - dropout) < 0.004
    assert abs(dropped.mean() - 1) < 0.01
    other = drop_weights(torch.ones(64, 4096), dropout, 6, rows, keys)
    alike = ((dropped == 0) == (other == 0)).double().mean()
    assert abs(alike - (dropout**2 + (1 - dropout) ** 2)) < 0.01
    assert not drop_weights(torch.ones(3, 4), 1.0, 5, rows[:3], keys[:4]).any()

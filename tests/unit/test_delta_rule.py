"""Delta rules on one process: packed rows are documents one by one, bytes, choices and refusals."""

from __future__ import annotations

import pytest
import torch

from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.recurrent.delta_exchange import DeltaSizes, choose_exchange, state_has_gradient
from hf_longctx.proof import compare
from hf_longctx.proof.chunk_noise import other_chunks
from hf_longctx.proof.model_under_test import ModelUnderTest, Setting
from hf_longctx.proof.result import Errors, judge, tolerance

from ..hybrids import build, gradients, noise_of, one_process, rows_of, upstream, worst


PACKED = rows_of(1, 9, 1, 21, 13)
# The layer of the benchmark: width 512, 4,096 tokens on two ranks.
LAYER = DeltaSizes(2, 1, 2048, 4, 8, 64, 64, 1, 4, 4, 4)


def bounds_of(batch) -> dict[str, torch.Tensor | int]:
    """The packed row's bounds as a collator without padding gives them; of one row."""
    lengths = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    bounds = torch.tensor([*lengths, batch["input_ids"].shape[1]], dtype=torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear"])
def test_packed_rows_are_their_documents_one_by_one(name):
    theirs, model = build(name, "sdpa"), build(name, "packed")
    expected = one_process(theirs, PACKED)
    attach_adapters(model)
    logits = model(**PACKED, use_cache=False).logits
    (logits * upstream(PACKED)).sum().backward()
    errors = worst((logits.detach(), gradients(model)), expected)
    assert errors["logits"] <= tolerance(8), errors
    assert errors["worst"] <= max(tolerance(46), 2 * noise_of(theirs, PACKED, expected)), errors


@pytest.mark.parametrize("lengths", [(2, 7), (9,)], ids=["two documents", "one document"])
def test_bounds_never_reach_what_refuses_them_without_kernels(lengths):
    """transformers 5.24 raises for `cu_seqlens` and `seq_idx` where flash-linear-attention is not installed."""
    batch = {"position_ids": torch.arange(9)[None], **rows_of(*lengths, rows=1)}
    expected, _ = one_process(build("qwen3_next", "sdpa"), batch)
    model = build("qwen3_next", "packed")
    attach_adapters(model)
    index = torch.repeat_interleave(torch.tensor(lengths))[None].int()
    for facts in (bounds_of(batch), {"seq_idx": index}):
        logits = model(**batch, **facts, use_cache=False).logits
        assert float((logits - expected).abs().max()) <= 1e-6


def test_bytes_of_a_layer_at_4096_tokens():
    assert LAYER.bytes_of("heads") == 2 * 2048 * 4 * (4 * (64 + 2) + 2 * 2 * 64 + 4 * 64) == 12_713_984
    assert LAYER.bytes_of("states") == 2 * 8 * 64 * (64 + 64) * 4 == 524_288
    assert choose_exchange(LAYER, True, None, "rule") == "states"
    short = DeltaSizes(2, 1, 32, 4, 8, 64, 64, 1, 4, 4, 4)
    assert short.bytes_of("states") == LAYER.bytes_of("states")  # does not grow with the row
    assert choose_exchange(short, True, None, "rule") == "heads"


def test_a_state_without_gradient_trades_heads_or_is_refused():
    assert choose_exchange(LAYER, False, None, "rule") == "heads"
    many = DeltaSizes(16, 1, 2048, 4, 8, 64, 64, 1, 4, 4, 4)
    assert choose_exchange(many, True, None, "rule") == "states"
    with pytest.raises(NotImplementedError, match=r"final state of `rule` has no gradient.*to 8 or less"):
        choose_exchange(many, False, None, "rule")
    with pytest.raises(NotImplementedError, match="final state of `rule` has no gradient"):
        choose_exchange(LAYER, False, "states", "rule")
    with pytest.raises(ValueError, match=r"shares the 8 heads of `rule` among 16 ranks"):
        choose_exchange(many, True, "heads", "rule")


class _OnlyForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state):
        return state.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no gradient of the final state")


def kernel(kind):
    """A kernel whose final state has a gradient, none, or a backward that raises."""

    def run(query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False):
        state = torch.einsum("bthk,bthv->bhkv", key, value) + initial_state
        return value, {"right": state, "detached": state.detach(), "raises": _OnlyForward.apply(state)}[kind]

    return run


@pytest.mark.parametrize(("kind", "expected"), [("right", True), ("detached", False), ("raises", False)])
def test_one_backward_shows_whether_a_final_state_has_a_gradient(kind, expected):
    with torch.no_grad():  # as the first forward of a reentrant checkpoint
        assert state_has_gradient(kernel(kind), 2, 2, 4, 4, 1, torch.float32, torch.device("cpu")) is expected


def test_noise_is_that_of_another_chunk_size_and_leaves_no_trace():
    model, batch = build("qwen3_next", "sdpa"), rows_of(150, rows=1)
    expected = one_process(model, batch)
    noise = noise_of(model, batch, expected)
    assert 0 < noise < 1e-3
    again = one_process(model, batch)
    assert torch.equal(again[0], expected[0])
    with other_chunks(torch.nn.Linear(2, 2)) as has_chunks:
        assert not has_chunks


def test_a_doubtful_case_is_judged_by_the_noise_of_one_process(monkeypatch):
    """Errors past the tolerance are exact within twice the noise, and wrong past it; the result quotes the noise."""
    tested = ModelUnderTest.of(build("qwen3_next").config, None, 1)
    pair = compare.Pair(tested, Setting(1), "float32")
    pair.baseline = None
    dense = judge("dense", Errors(0.0, 0.0, 5e-4, "A_log", 0.0), "float32", 1)
    assert dense.outcome == "wrong" and dense.noise is None
    for noise, outcome in ((4e-4, "exact"), (1e-4, "wrong")):
        monkeypatch.setattr(compare, "compare", lambda *_, noise=noise: Errors(0.0, 0.0, noise, "A_log", 0.0))
        again = pair._with_noise(dense, dense.errors, 0.0)
        assert (again.outcome, again.noise) == (outcome, noise)

"""LSH attention as a function: against its definition, full attention, transformers' Reformer, and documents alone."""

from __future__ import annotations

import pytest
import torch
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from hf_longctx import LSHConfig, lsh_attention
from hf_longctx.attention import lsh_hashing
from hf_longctx.attention.lsh_hashing import draw_rotations, hash_tokens
from hf_longctx.attention.lsh_layouts import SELF_SCORE
from hf_longctx.attention.reference import reference_lsh


B, N, T, H, HV = 2, 2, 19, 8, 5
SEGMENTS = torch.tensor([[0] * 5 + [1] + [2] * 13, [-1] + [0] * 7 + [1] * 9 + [-1] * 2])
BAR = 1e-12  # float64: nothing but the order of sums differs


def make_inputs(rows: int = B, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randn(rows, N, tokens, size, generator=generator, dtype=torch.float64).requires_grad_()
    return draw(H), draw(HV)


def with_gradients(output: torch.Tensor, inputs, upstream: torch.Tensor | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if upstream is None:
        upstream = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return [output, *torch.autograd.grad((output * upstream).sum(), inputs, retain_graph=True)]


def assert_same(actual, expected, bar: float = BAR) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine - theirs).abs().max() <= bar * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("layout", ["causal", "reformer"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("rounds", "window", "buckets", "segments"),
    [(1, 4, 2, None), (3, 3, 2, SEGMENTS), (2, 40, 2, SEGMENTS)],
)
def test_equals_its_definition(layout, causal, rounds, window, buckets, segments):
    query, value = make_inputs()
    settings = {"layout": layout, "window": window, "causal": causal, "scaling": 0.7}
    hashed = hash_tokens(query, draw_rotations(5, 1, 2, N, H, rounds, buckets))
    documents = None if segments is None else segments.tolist()
    expected = reference_lsh(query, value, hashed, segments=documents, **settings)
    numbers = {"num_hashes": rounds, "num_buckets": buckets, "seed": 5, "layer": 1, "first_head": 2}
    actual = lsh_attention(query, value, segments=segments, **settings, **numbers)
    assert_same(*(with_gradients(output, (query, value)) for output in (actual, expected)))


def test_a_window_over_several_blocks_equals_its_definition(monkeypatch):
    monkeypatch.setattr("hf_longctx.attention.lsh_layouts._BLOCK", 4)
    monkeypatch.setattr("hf_longctx.attention.lsh_rounds._SCORES_ON_CPU", 100)  # three blocks at a time
    query, value = make_inputs()
    hashed = hash_tokens(query, draw_rotations(0, 0, 0, N, H, 2, 2))
    for causal in (True, False):
        settings = {"window": 7, "causal": causal, "segments": SEGMENTS, "scaling": 1.0}
        actual = lsh_attention(query, value, num_hashes=2, num_buckets=2, **settings)
        expected = reference_lsh(query, value, hashed, **{**settings, "segments": SEGMENTS.tolist()})
        assert_same(*(with_gradients(output, (query, value)) for output in (actual, expected)))


def full_attention(query, value, scaling: float) -> torch.Tensor:
    """Shared queries and keys under a causal mask, with no hashing: the score of a token with itself is Reformer's."""
    keys = query * (query.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * H**-0.5
    scores = query @ keys.mT * scaling
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    scores = scores.masked_fill(torch.eye(T, dtype=torch.bool), SELF_SCORE)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("layout", ["causal", "reformer"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_one_bucket_and_a_wide_window_are_full_attention(layout, rounds):
    query, value = make_inputs()
    expected = full_attention(query, value, 2.0)
    for window in (T, 3 * T):
        settings = {"num_buckets": 1, "num_hashes": rounds, "layout": layout, "scaling": 2.0, "window": window}
        actual = lsh_attention(query, value, **settings)
        assert_same(*(with_gradients(output, (query, value)) for output in (actual, expected)))


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_reformer_of_transformers(rounds, causal):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8, "lsh_attn_chunk_length": 8}
    config = ReformerConfig(
        **sizes,
        num_hashes=rounds,
        num_buckets=6,
        hash_seed=3,
        is_decoder=causal,
        lsh_attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    layer = LSHSelfAttention(config, 0).double()
    hidden = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True)
    with torch.random.fork_rng():  # it seeds the user's stream in every forward
        expected = layer(hidden).hidden_states
        torch.manual_seed(3)
        rotations = torch.randn(2, 8, rounds, 3, dtype=torch.float64).permute(2, 0, 1, 3)
    query, value = (make(hidden).view(2, 40, 2, 8).transpose(1, 2) for make in (layer.query_key, layer.value))
    settings = {"num_hashes": rounds, "num_buckets": 6, "window": 8, "layout": "reformer", "causal": causal}
    actual = lsh_attention(query, value, **settings, scaling=1.0, rotations=rotations).flatten(2)
    # A token that sees itself alone in all rounds: transformers takes a log-sum-exp of -1e5, which has an ulp of
    # 1.5e-11, and its weights do not sum up to 1. Ours do, so these tokens are compared with what it means.
    alone = (actual.unflatten(2, (2, 8)) - value.transpose(1, 2)).abs().amax(-1, keepdim=True) < 1e-12
    alone = alone.expand(-1, -1, -1, 8).flatten(2)
    assert (actual - expected)[~alone].abs().max() <= BAR
    assert (actual - expected)[alone].abs().max() <= 4e-11 if causal else not alone.any()
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(actual.shape, generator=generator, dtype=torch.float64).masked_fill(alone, 0)
    inputs = hidden, *layer.parameters()
    gradients = [with_gradients(output, inputs, upstream)[1:] for output in (actual, expected)]
    assert_same(*gradients)


@pytest.mark.parametrize(("layout", "bar"), [("causal", 1e-12), ("reformer", 1e-10)])
def test_packed_documents_are_documents_alone(layout, bar):
    query, value = make_inputs(1)
    settings = {"num_hashes": 3, "num_buckets": 4, "window": 4, "layout": layout}
    packed = lsh_attention(query, value, segments=SEGMENTS[:1], **settings)
    bounds = [(0, 5), (5, 6), (6, T)]
    alone = [lsh_attention(query[:, :, a:b], value[:, :, a:b], **settings) for a, b in bounds]
    assert_same(*(with_gradients(output, (query, value)) for output in (packed, torch.cat(alone, dim=1))), bar)


def test_the_causal_layout_depends_on_earlier_tokens_only():
    query, value = make_inputs()
    settings = {"num_hashes": 3, "num_buckets": 4, "window": 4}
    whole = lsh_attention(query, value, **settings)
    prefix = lsh_attention(query[:, :, :12], value[:, :, :12], **settings)
    changed = torch.cat([query[:, :, :12], -3 * query[:, :, 12:]], dim=2)
    other = lsh_attention(changed, torch.cat([value[:, :, :12], -value[:, :, 12:]], dim=2), **settings)
    for output in (prefix, other[:, :12]):
        assert_same(*(with_gradients(x, (query, value)) for x in (output, whole[:, :12])))
    # The paper's layout looks at no later token, but which earlier ones it shows depends on them.
    paper = [lsh_attention(x, value, layout="reformer", **settings)[:, :12] for x in (query, changed)]
    assert (paper[0] - paper[1]).abs().max() > 0.1
    assert not torch.autograd.grad(paper[0].sum(), value)[0][:, :, 12:].any()


def test_rotations_are_of_a_seed_a_layer_and_a_head():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    rotations = draw_rotations(1, 2, 0, 4, H, 4, 6)
    assert torch.equal(torch.rand(3), expected)  # the user's stream is as it was
    assert torch.equal(draw_rotations(1, 2, 2, 2, H, 4, 6), rotations[:, 2:])
    assert torch.equal(draw_rotations(1, 2, 0, 4, H, 2, 6), rotations[:2])
    others = [draw_rotations(0, 2, 0, 4, H, 4, 6), draw_rotations(1, 3, 0, 4, H, 4, 6), rotations.roll(1, 1)]
    assert not any((other == rotations).any() for other in others)


def test_small_rotations_stay_on_their_device(monkeypatch):
    query, _ = make_inputs()
    with torch.inference_mode():
        kept = lsh_hashing.rotations_for(query, 1, 2, 3, 2, 6)
    assert lsh_hashing.rotations_for(query, 1, 2, 3, 2, 6) is kept and not kept.is_inference()
    assert torch.equal(kept, draw_rotations(1, 2, 3, N, H, 2, 6))
    assert lsh_hashing.rotations_for(query.bfloat16(), 1, 2, 3, 2, 6).dtype == torch.float32
    monkeypatch.setattr(lsh_hashing, "_ROTATIONS_KEPT", N * H * 2 * 3 - 1)
    large = lsh_hashing.rotations_for(query, 1, 2, 3, 2, 6)
    assert large is not kept and torch.equal(large, kept)


def test_backward_holds_no_more_for_more_rounds():
    query, value = make_inputs()

    def saved(rounds: int) -> int:
        sizes: list[int] = []
        keep = lambda x: sizes.append(x.numel() * x.element_size()) or x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            lsh_attention(query, value, num_hashes=rounds, num_buckets=4, window=4)
        return sum(sizes)

    assert saved(8) - saved(1) == 7 * B * N * T * 2  # the buckets, as int16


def test_dropout_is_the_same_for_heads_alone():
    from hf_longctx.attention.lsh_rounds import Rounds, attend_rounds

    query, value = make_inputs()
    hashed = hash_tokens(query, draw_rotations(0, 0, 0, N, H, 2, 4))
    for layout in ("causal", "reformer"):
        whole = attend_rounds(query, value, hashed, Rounds(layout, 4, True, 1.0, None, 0.3, 7))
        alone = attend_rounds(
            query[:, 1:], value[:, 1:], hashed[:, :, 1:], Rounds(layout, 4, True, 1.0, None, 0.3, 7, 1)
        )
        assert torch.equal(whole[:, :, 1:], alone)
        without = attend_rounds(query, value, hashed, Rounds(layout, 4, True, 1.0))
        assert (whole - without).abs().max() > 0.1
    short = (query[:1, :1, :6], value[:1, :1, :6])
    rounds = Rounds("reformer", 3, True, 1.0, None, 0.4, 7)
    assert torch.autograd.gradcheck(lambda q, v: attend_rounds(q, v, hashed[:, :1, :1, :6], rounds), short)


def test_empty_rows_and_half_precision():
    query, value = make_inputs()
    assert lsh_attention(query[:, :, :0], value[:, :, :0]).shape == (B, 0, N, HV)
    half = [x.detach().bfloat16().requires_grad_() for x in (query, value)]
    settings = {"num_buckets": 4, "window": 4}
    hashed = hash_tokens(half[0], draw_rotations(0, 0, 0, N, H, 4, 4))
    expected = reference_lsh(half[0].double(), half[1].double(), hashed, window=4, scaling=H**-0.5)
    actual = lsh_attention(*half, **settings)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_buckets": 7}, "`num_buckets` .7. must be even"),
        ({"num_buckets": None}, "never taken from the length"),
        ({"num_buckets": 2**31}, "must be even and at most"),
        ({"num_hashes": 0}, "`num_hashes` .0."),
        ({"window": 1}, "`window` .1. .* itself only if nothing else"),
        ({"hash_seed": -1}, "`hash_seed`"),
        ({"window": True}, "`window`"),
        ({"layout": "paper"}, "`layout` .'paper'. must be one of causal, reformer"),
    ],
)
def test_settings_that_no_run_could_use_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        LSHConfig(**changes)


def test_inputs_that_do_not_go_together_are_refused():
    query, value = make_inputs()
    with pytest.raises(ValueError, match="repeat key/value heads first"):
        lsh_attention(query, value[:, :1])
    with pytest.raises(ValueError, match="`segments` .1, 19."):
        lsh_attention(query, value, segments=SEGMENTS[:1])
    with pytest.raises(ValueError, match=r"`value` .* must have the rows, heads and tokens"):
        lsh_attention(query, value[..., 0])
    with pytest.raises(ValueError, match="`query` .* must have the shape"):
        lsh_attention(query[0], value)
    for changes, words in (
        ({"value": None}, "`value` .a NoneType. must be a tensor of floating-point numbers"),
        ({"query": query.detach().long()}, "`query` .a tensor of torch.int64. must be"),
        ({"segments": SEGMENTS.tolist()}, "`segments` .a list. must be a tensor of integers"),
        ({"segments": SEGMENTS.float()}, "`segments` .a tensor of torch.float32. must be"),
        ({"rotations": [1.0]}, "`rotations` .a list. must be"),
        ({"scaling": "1"}, "`scaling` .'1'. must be a number"),
    ):
        with pytest.raises(ValueError, match=words):
            lsh_attention(**{"query": query, "value": value, **changes})
    with pytest.raises(ValueError, match="`rotations` has shape .1, 2, 8, 3."):
        lsh_attention(query, value, rotations=torch.randn(1, N, H, 3))

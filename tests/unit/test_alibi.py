"""ALiBi: slopes, both forms of its numbers, long rows, windows, caches, memory and precision."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_numbers
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_numbers
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from hf_longctx import explain_attention
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.attention import distance_bias
from hf_longctx.attention.alibi import alibi_slopes, key_table, mpt_slopes
from hf_longctx.attention.packed import packed_attention
from hf_longctx.attention.registry import find_attention
from hf_longctx.parallel.shard import SequenceShard, cut_batch

from ..own_attention import TOLERANCE, difference, forward, gradients_of, model_of, projection, rows_of


HEADS = [*range(1, 17), 20]
ALIBI = ["bloom, 6 heads", "mpt, 6 heads, clipped", "falcon alibi"]


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_are_those_of_transformers(heads):
    mask = torch.ones(1, 3, dtype=torch.long)
    slopes = alibi_slopes(heads)
    assert torch.equal(slopes, bloom_numbers(mask, heads, torch.float32)[:, 0, 1])
    assert torch.equal(slopes.bfloat16(), falcon_numbers(mask, heads, torch.bfloat16)[:, 0, 1])
    for bias_max in (8, 4):
        assert torch.equal(mpt_slopes(heads, bias_max), -build_mpt_alibi_tensor(heads, 2, bias_max)[:, 0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_of_the_key_form_are_those_of_transformers(dtype):
    mask, slopes = torch.ones(1, 700, dtype=torch.long), alibi_slopes(6)
    assert torch.equal(key_table(slopes, 700, dtype), bloom_numbers(mask, 6, dtype)[:, 0])
    # Falcon multiplies in bfloat16, whatever the model's precision is.
    assert torch.equal(key_table(slopes.bfloat16(), 700, dtype), falcon_numbers(mask, 6, dtype)[:, 0])


def packed(query, key, value, lengths=None, shard=None, window=None, **numbers):
    """Our attention on rows of `lengths` tokens each."""
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, query.shape[1] // key.shape[1]
    rows, _, tokens, _ = query.shape
    segments = None
    if lengths is not None:
        segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    shard = SequenceShard(1, 0, tokens, tokens, segments, segments is None) if shard is None else shard
    mask = None
    if window is not None:
        config = SimpleNamespace(_attn_implementation="packed", sliding_window=window)
        mask = create_sliding_window_causal_mask(config, torch.zeros(rows, tokens, 1), None, None)
    function = find_attention("packed").function
    return function(module, query, key, value, mask, sequence_shard=shard, **numbers)[0]


def by_definition(query, key, value, slopes, lengths=None, window=None):
    """In float64, with every score written down."""
    query, key, value = (x.double() for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    places = torch.arange(query.shape[2])
    distance = places[:, None] - places
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if lengths is not None:
        document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        seen &= document[:, None] == document
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 - slopes.double()[:, None, None] * distance.abs()
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def heads_of(tokens: int, heads: int = 6, keys: int = 6, size: int = 8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randn(1, n, tokens, size, generator=generator, dtype=torch.float64).to(dtype)
    return draw(heads), draw(keys), draw(keys)


@pytest.mark.parametrize("keys", [6, 2])
@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize("block", [512, 48])
def test_attention_is_that_of_the_definition(keys, window, block, monkeypatch):
    monkeypatch.setattr(distance_bias, "QUERY_BLOCK", block)
    lengths, slopes = [7, 160, 1, 160, 32], alibi_slopes(6)
    mine = [x.requires_grad_() for x in heads_of(sum(lengths), keys=keys)]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    output = packed(*mine, lengths, window=window, alibi_slopes=slopes)
    expected = by_definition(*theirs, slopes, lengths, window)
    assert difference(output, expected) <= 1e-12
    weights = torch.randn_like(expected)
    ours, exact = (torch.autograd.grad((x * weights).sum(), of) for x, of in ((output, mine), (expected, theirs)))
    assert all(difference(one, two) <= 1e-12 for one, two in zip(ours, exact))


def test_learned_numbers_of_long_documents_get_their_gradient(monkeypatch):
    query, key, value = heads_of(90)
    table = torch.randn(6, 179, dtype=torch.float64, requires_grad=True)
    results = []
    for block in (512, 16):
        monkeypatch.setattr(distance_bias, "QUERY_BLOCK", block)
        output = packed(query, key, value, distance_bias=table)
        results.append((output, torch.autograd.grad(output.square().sum(), table)[0]))
    (one, of_one), (two, of_two) = results
    assert difference(one, two) <= 1e-12 and difference(of_one, of_two) <= 1e-12


@pytest.mark.parametrize("softcap, sinks", [(2.0, None), (None, torch.ones(6, dtype=torch.float64))])
def test_eager_takes_caps_and_sinks_beside_the_numbers(softcap, sinks):
    query, key, value = heads_of(11)
    slopes = alibi_slopes(6)
    scores = query @ key.transpose(2, 3) * 8**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    places = torch.arange(11)
    distance = places[:, None] - places
    scores = (scores - slopes.double()[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, 6, 1, 1).expand(1, 6, 11, 1)], -1)
    expected = (scores.softmax(-1)[..., :11] @ value).transpose(1, 2)
    assert difference(packed(query, key, value, alibi_slopes=slopes, softcap=softcap, s_aux=sinks), expected) <= 1e-12


def test_distances_hold_in_bfloat16_where_the_key_form_does_not():
    slopes = alibi_slopes(8)
    query, key, value = heads_of(4096, 8, 8, 16, torch.float32)
    exact = packed(query, key, value, alibi_slopes=slopes)
    half = [x.bfloat16() for x in (query, key, value)]
    largest = float(exact.abs().max())
    ours = packed(*half, alibi_slopes=slopes).float()
    assert float((ours - exact).abs().max()) <= 1e-2 * largest
    theirs = packed(*half, key_bias=key_table(slopes, 4096, torch.bfloat16)).float()
    assert float((theirs - exact).abs().max()) >= 0.5 * largest


def test_no_mask_of_whole_rows_is_kept():
    lengths = [64] * 16
    query, key, value = (x.float().requires_grad_() for x in heads_of(1024))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        packed(query, key, value, lengths, alibi_slopes=alibi_slopes(6))
    assert max(saved) < 1024 * 1024 // 4
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        packed(query, key, value, alibi_slopes=alibi_slopes(6))  # one document, longer than a block
    assert max(saved) <= query.numel()


def test_flex_attention_gets_the_numbers_of_each_score():
    call = SimpleNamespace(per_head={"alibi_slopes": alibi_slopes(6)})
    add, score = distance_bias.score_rule(call), torch.tensor(1.0)
    assert float(add(score, 0, 2, torch.tensor(9), torch.tensor(4))) == pytest.approx(
        1 - 5 * float(alibi_slopes(6)[2])
    )
    table = torch.arange(2 * 19.0).view(2, 19)
    add = distance_bias.score_rule(SimpleNamespace(per_head={"distance_bias": table}))
    assert float(add(score, 0, 1, torch.tensor(9), torch.tensor(4))) == 1 + float(table[1, 4 - 9 + 9])


def test_flex_attention_on_packed_rows_of_six_heads_that_share_keys():
    """Forward only, as torch has no other on a CPU: the heads are no power of two, so keys are repeated."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 23, 16) for heads in (6, 2, 2))
    shard = cut_batch({"input_ids": torch.zeros(1, 23).long(), "position_ids": POSITIONS}, 1, 0)["sequence_shard"]
    outputs = []
    for kernel in ("flex_attention", "sdpa"):
        chosen = replace(shard, inner_attention=kernel)
        layer = SimpleNamespace(config=None, is_causal=True)
        with torch.no_grad():
            given = {"alibi_slopes": alibi_slopes(6), "sequence_shard": chosen}
            outputs.append(packed_attention(layer, query, key, value, None, **given)[0])
    torch.testing.assert_close(*outputs)


POSITIONS = torch.cat([torch.arange(length) for length in (9, 1, 13)])[None]


def test_explain_attention_says_what_is_made_for_the_distances():
    model = model_of("bloom, 6 heads", "packed")
    attach_adapters(model)
    (plan,) = explain_attention(model, {"input_ids": torch.arange(10, 33)[None], "position_ids": POSITIONS}).plans
    assert plan.largest_mask == 13 * 13
    assert (
        str(plan) == "causal: sdpa, 3 segments of 1 to 13 tokens: 3 blocks in 3 calls, largest mask 169 entries a head"
    )


# Models


def test_padding_between_tokens_is_refused_where_distances_count_tokens():
    for case in ALIBI:
        model, reference = model_of(case, "packed"), model_of(case, "eager")
        attach_adapters(model)
        batch = rows_of(case, "left", model.config)
        batch["attention_mask"][1, 4:6] = 0
        share = cut_batch(batch, 1, 0)
        if case.startswith("mpt"):  # counts places
            real = batch["attention_mask"][..., None]
            assert difference(forward(model, share) * real, forward(reference, batch) * real) <= TOLERANCE
            continue
        with pytest.raises(NotImplementedError, match="zeros between the tokens"):
            forward(model, share)


@pytest.mark.parametrize("case", ALIBI)
def test_recomputed_layers_are_the_same(case):
    model = model_of(case, "packed").train()
    attach_adapters(model)
    batch = rows_of(case, "packed", model.config)
    outputs = forward(model, batch)
    weights = projection(batch, outputs.shape[-1])
    expected = gradients_of(model, (outputs * weights).sum())
    model.gradient_checkpointing_enable()
    actual = gradients_of(model, (forward(model, batch) * weights).sum())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", ALIBI)
def test_dropout_of_attention_is_drawn(case):
    model = model_of(case, "packed").train()
    attach_adapters(model)
    for module in model.modules():
        if hasattr(module, "attn_dropout_p"):
            module.attn_dropout_p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout.p = 0.5
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(forward(model, rows_of(case, "packed", model.config)))
    assert torch.equal(*outputs[:2]) and not torch.equal(*outputs[1:])


@pytest.mark.parametrize("case", ALIBI)
def test_generation_is_that_of_transformers_or_refused(case):
    model, reference = model_of(case, "packed"), model_of(case, "eager")
    attach_adapters(model)
    given = {**rows_of(case, "left", model.config), "max_new_tokens": 6, "do_sample": False}
    expected = reference.generate(**given)
    if case.startswith("falcon"):
        with pytest.raises(NotImplementedError, match="after a cache"):
            model.generate(**given)
        given["use_cache"] = False
    assert torch.equal(model.generate(**given), expected)


def test_an_unknown_form_is_refused():
    model = model_of("bloom, 6 heads", "packed")
    attach_adapters(model)
    model.config.alibi_form = "places"
    with pytest.raises(ValueError, match="`config.alibi_form` \\('places'\\)"):
        forward(model, rows_of("bloom", "packed", model.config))


@pytest.mark.parametrize("case", ALIBI)
def test_lora_trains_as_on_one_document_alone(case):
    from peft import LoraConfig, get_peft_model

    grads = []
    for attention in ("eager", "packed"):
        torch.manual_seed(0)
        target = "Wqkv" if case.startswith("mpt") else "query_key_value"
        model = get_peft_model(
            model_of(case, attention), LoraConfig(target_modules=[target], init_lora_weights=False, lora_dropout=0.0)
        )
        attach_adapters(model)
        batch = rows_of(case, "dense", model.config)
        batch = batch if attention == "eager" else cut_batch(batch, 1, 0)
        outputs = model(**batch, use_cache=False)[0]
        outputs.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    largest = max(float(grad.abs().max()) for grad in grads[0].values())
    assert all(difference(grads[1][name], grads[0][name], largest) <= TOLERANCE for name in grads[0])

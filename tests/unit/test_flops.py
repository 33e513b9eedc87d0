"""FLOPs of a training step: against torch's own counter, against masks that are counted, against formulas by hand."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

from hf_longctx.adapters.tiled_mlp import tile_mlp
from hf_longctx.reporting.flops import AttentionSpan, count_flops, count_products
from hf_longctx.ttt import TTTModelConfig

from ..models import VOCAB, build, config_of


TOKENS = 80
LLAMA_8B = tf.LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128256
)
CASES = {
    "dense": ("gpt2", {}),
    "gated": ("llama", {"num_key_value_heads": 6}),
    "grouped_queries": ("llama", {}),
    "head_size_of_its_own": ("qwen3", {"head_dim": 16}),
    "window": ("mistral", {}),
    "window_in_some_layers": ("gemma2", {}),
    "encoder": ("modernbert", {}),
    "latent_attention": ("deepseek_v3", {}),
    "latent_attention_and_experts": ("deepseek_v3", {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    "experts": ("gpt_oss", {}),
    "tied_head": ("llama", {"tie_word_embeddings": True}),
}


def model_of(name: str, changes: dict):
    model = build(name, "eager", **changes)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernel has no formula in torch's counter
    return model.train()


def counted(model, lengths: list[int]) -> tuple[int, int]:
    """What torch counts forward and backward, each document run by itself."""
    totals = []
    rows = [torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(0)) for length in lengths]
    with FlopCounterMode(display=False) as counter:
        losses = [model(input_ids=ids, labels=ids).loss for ids in rows]
    totals.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        for loss in losses:
            loss.backward()
    return totals[0], counter.get_total_flops()


def mask_of(span: AttentionSpan, length: int) -> torch.Tensor:
    """The obvious reference of `count_pairs`: every pair looked at."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = key <= query if span.causal else torch.ones(length, length, dtype=torch.bool)
    if span.window is not None:
        seen = seen & (key > query - span.window if span.causal else (query - key).abs() <= span.window)
    if span.chunk is not None:
        seen = seen & (query // span.chunk == key // span.chunk)
    return seen


# Against torch, which counts every pair of a document, seen or not


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_what_torch_counts(case):
    name, changes = CASES[case]
    model = model_of(name, changes)
    forward, backward = counted(model, [TOKENS])
    flops = count_flops(model.config, type(model)).step([TOKENS], count_masked=True)
    assert flops.forward == pytest.approx(forward, rel=0.02)
    assert flops.backward == pytest.approx(backward, rel=0.02)
    assert flops.model == flops.hardware == flops.forward + flops.backward


def test_convolutions_are_counted():
    model = model_of("lfm2", {})
    forward, backward = counted(model, [TOKENS])
    flops = count_flops(model.config).step([TOKENS], count_masked=True)
    assert flops.forward == pytest.approx(forward, rel=0.002)
    channels, kernel = model.config.hidden_size, model.config.conv_L_cache
    # torch takes one of the two gradients of a convolution with groups for that of one without.
    too_many = (channels - 1) * 2 * channels * kernel * (TOKENS + kernel - 1)
    assert flops.backward == pytest.approx(backward - too_many, rel=0.002)


@pytest.mark.parametrize("case", ["dense", "grouped_queries", "window", "latent_attention"])
def test_packed_documents_are_what_torch_counts_one_by_one(case):
    name, changes = CASES[case]
    model = model_of(name, changes)
    lengths = [63, 1, 17, 40]
    forward, backward = counted(model, lengths)
    flops = count_flops(model.config).step(lengths, count_masked=True)
    assert flops.model == pytest.approx(forward + backward, rel=0.02)
    assert flops.model < count_flops(model.config).step([sum(lengths)], count_masked=True).model


@pytest.mark.parametrize(
    ("recompute", "tiled", "checkpointing"),
    [
        ("mlp", True, None),
        ("layers", False, {"use_reentrant": True}),
        ("layers", True, {"use_reentrant": False}),  # tiles run whole; the layer stops in front of them
    ],
)
def test_hardware_flops_count_what_is_run_again(recompute, tiled, checkpointing):
    model = model_of("llama", {})
    if tiled:
        tile_mlp(model, 16)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    flops = count_flops(model.config).step([TOKENS], count_masked=True, recompute=recompute)
    assert flops.hardware == pytest.approx(sum(counted(model, [TOKENS])), rel=0.02)
    assert flops.model == count_flops(model.config).step([TOKENS], count_masked=True).model < flops.hardware


@pytest.mark.parametrize("frozen", ["mlp", "self_attn", "lm_head"])
def test_frozen_weights_need_no_gradient(frozen):
    model = model_of("llama", {})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    share = count_products(model, model.config, trained_only=True) / count_products(model, model.config)
    flops = count_flops(model.config).step([TOKENS], count_masked=True, trained_share=share)
    assert flops.model == pytest.approx(sum(counted(model, [TOKENS])), rel=0.02)
    assert 0 < share < 1


# The two conventions, and what is seen


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 63, 100])
@pytest.mark.parametrize(
    "span",
    [
        AttentionSpan(),
        AttentionSpan(window=1),
        AttentionSpan(window=8),
        AttentionSpan(window=1000),
        AttentionSpan(chunk=8),
        AttentionSpan(causal=False),
        AttentionSpan(causal=False, window=0),
        AttentionSpan(causal=False, window=8),
        AttentionSpan(causal=False, chunk=8),
    ],
    ids=str,
)
def test_pairs_are_those_of_the_mask(span, length):
    lengths = torch.tensor([length, 5, 0])
    expected = [int(mask_of(span, int(each)).sum()) for each in lengths]
    assert span.count_pairs(lengths).tolist() == expected


def test_a_causal_row_has_half_the_pairs_that_torch_counts():
    flops = count_flops(config_of("llama"))
    ((span, per_pair),) = flops.attention
    assert span == AttentionSpan()
    seen, square = flops.step([TOKENS]), flops.step([TOKENS], count_masked=True)
    assert square.forward - seen.forward == (TOKENS * TOKENS - TOKENS * (TOKENS + 1) // 2) * per_pair
    assert square.backward - seen.backward == 2 * (square.forward - seen.forward)


def test_documents_of_a_row_are_counted_by_themselves():
    flops = count_flops(config_of("llama"))
    assert flops.step([30, 50]).model == flops.step([30]).model + flops.step([50]).model < flops.step([80]).model


@pytest.mark.parametrize(
    ("name", "changes", "spans"),
    [
        ("mistral", {}, {AttentionSpan(window=5): 2}),
        ("mistral", {"sliding_window": None}, {AttentionSpan(): 2}),
        ("gemma2", {}, {AttentionSpan(window=5): 1, AttentionSpan(): 1}),
        ("gpt_oss", {}, {AttentionSpan(window=5): 1, AttentionSpan(): 1}),
        ("llama4", {}, {AttentionSpan(chunk=6): 3, AttentionSpan(): 1}),
        ("modernbert", {}, {AttentionSpan(causal=False): 2, AttentionSpan(causal=False, window=3): 2}),
        ("bert", {}, {AttentionSpan(causal=False): 2}),
    ],
)
def test_spans_of_layers(name, changes, spans):
    config = config_of(name, **changes)
    pair = 2 * config.num_attention_heads * 2 * 8
    assert dict(count_flops(config).attention) == {span: layers * pair for span, layers in spans.items()}


# By hand


def test_llama_8b_by_hand():
    flops = count_flops(LLAMA_8B)
    attention, mlp = 4096 * (4096 + 2 * 1024 + 4096), 3 * 4096 * 14336
    assert flops.layers_per_token == 2 * 32 * (attention + mlp)
    assert flops.mlp_per_token == 2 * 32 * mlp
    assert flops.rest_per_token == 2 * 4096 * 128256
    assert flops.attention == ((AttentionSpan(), 32 * 4 * 4096),)
    million = flops.step([2**20])
    assert million.model == 3 * (2**20 * (flops.layers_per_token + flops.rest_per_token) + 2**19 * (2**20 + 1) * 2**19)
    assert million.forward == pytest.approx(3 * 10**17, rel=0.02)


def test_experts_count_as_often_as_a_token_meets_them():
    one = count_flops(tf.MixtralConfig(num_experts_per_tok=1, num_hidden_layers=2))
    two = count_flops(tf.MixtralConfig(num_experts_per_tok=2, num_hidden_layers=2))
    many = count_flops(tf.MixtralConfig(num_experts_per_tok=2, num_hidden_layers=2, num_local_experts=64))
    assert two.layers_per_token - one.layers_per_token == 2 * 2 * 3 * 4096 * 14336
    assert many.layers_per_token - two.layers_per_token == 2 * 2 * 4096 * 56  # a longer router
    assert two.mlp_per_token == 0


def test_tied_and_untied_heads_cost_the_same():
    tied, untied = (count_flops(config_of("llama", tie_word_embeddings=tie)) for tie in (True, False))
    assert tied == untied


def test_a_multimodal_configuration_is_counted_by_its_text():
    config = tf.Gemma3Config()
    assert count_flops(config) == count_flops(config.get_text_config())


def test_the_configuration_is_left_alone():
    config = config_of("llama")
    before = config.to_dict(), config._attn_implementation
    count_flops(config)
    assert (config.to_dict(), config._attn_implementation) == before


# Refusals


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tf.T5Config(), "`T5Config` is an encoder-decoder"),
        (TTTModelConfig(ttt={"window": 8}), "`TTTModelConfig` takes inner steps"),
        (tf.MambaConfig(), "`MambaForCausalLM` has 0 attention modules in 32 layers"),
        (tf.GPTNeoConfig(), "`GPTNeoConfig` has layers of type 'global'"),
        (tf.CLIPVisionConfig(), "transformers has no language model for `CLIPVisionConfig`"),
    ],
)
def test_models_whose_flops_are_not_known_are_refused(config, said):
    with pytest.raises(NotImplementedError, match=said):
        count_flops(config)


def test_bad_arguments_are_refused():
    flops = count_flops(config_of("llama"))
    with pytest.raises(ValueError, match="`recompute` \\('all'\\) must be one of 'none', 'mlp', 'layers'"):
        flops.step([8], recompute="all")
    with pytest.raises(ValueError, match="`trained_share` \\(1.5\\) must lie between 0"):
        flops.step([8], trained_share=1.5)

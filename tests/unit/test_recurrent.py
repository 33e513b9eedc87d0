"""Layers with a state or a convolution along the sequence, on one process: documents, caches, generation, wrappers."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import DynamicCache

from hf_longctx import SequenceMesh, adapt, shard_batch
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.recurrent.convolution import convolve
from hf_longctx.adapters.recurrent.layers import unfollowed_layers
from hf_longctx.adapters.recurrent.pieces import pieces_of
from hf_longctx.adapters.recurrent.window import run_window
from hf_longctx.adapters.tiled_loss import tile_loss
from hf_longctx.attention.unadapted import validate_config
from hf_longctx.parallel.gathered import gather_shares
from hf_longctx.parallel.imaginary import ImaginaryRanks
from hf_longctx.parallel.shard import cut_batch

from ..recurrent import (
    PACKED,
    build_hybrid,
    draw,
    logits_alone,
    numbers_alone,
    packed_rows,
    padded_rows,
    window_layer,
    worst,
)


MESH = SequenceMesh.build(1)
BOUNDS = torch.tensor([0, 6, 7, 23], dtype=torch.int32)
FLAT = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 16, "max_length_k": 16}
INDEX = torch.tensor([0] * 6 + [1] + [2] * 16, dtype=torch.int32)[None]
ROW = packed_rows((6, 1, 16))


@pytest.fixture
def adapted():
    model = build_hybrid("packed")
    attach_adapters(model)
    return model


@pytest.fixture(scope="module")
def plain():
    return build_hybrid("sdpa")


def test_rows_are_those_of_documents_alone_however_a_batch_tells_them(adapted, plain):
    for facts in ({}, FLAT, {"seq_idx": INDEX}):
        logits = adapted(**ROW, **facts, use_cache=False).logits
        torch.testing.assert_close(logits, logits_alone(plain, ROW), rtol=0, atol=1e-12)
    batch = packed_rows(*PACKED)
    embedded = {"inputs_embeds": adapted.get_input_embeddings()(batch["input_ids"])}
    for inputs in (batch, {**batch, "input_ids": None, **embedded}, shard_batch(batch, MESH)):
        logits = adapted(**inputs, use_cache=False).logits
        torch.testing.assert_close(logits, logits_alone(plain, batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("masks", [("1011", "1111"), ("0111", "1110"), ("1010", "0101")])
def test_masks_are_transformers_own_with_holes_too(adapted, plain, masks):
    batch = padded_rows(*masks)
    assert worst(numbers_alone(adapted, batch), numbers_alone(plain, batch)) < 1e-12


def test_documents_next_to_a_mask_are_refused_without_any_attention():
    config = tf.Mamba2Config(
        vocab_size=97, hidden_size=32, num_heads=4, head_dim=16, state_size=4, n_groups=1, num_hidden_layers=1
    )
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    attach_adapters(model)
    ones = torch.ones_like(ROW["input_ids"])
    model(input_ids=ROW["input_ids"], attention_mask=ones, use_cache=False)
    for facts in (FLAT, {"seq_idx": INDEX}):
        with pytest.raises(ValueError, match="packs several documents in a row and also has an `attention_mask`"):
            model(input_ids=ROW["input_ids"], attention_mask=ones, use_cache=False, **facts)


# Caches


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_generated_text_is_transformers_own_with_and_after_the_adapter(plain, settings):
    model, ids = build_hybrid("packed"), draw(2, 7)
    handle, mask = adapt(model, MESH), torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    for facts in ({}, {"attention_mask": mask}):
        expected = plain.generate(ids, **facts, **settings)
        assert torch.equal(model.generate(ids, **facts, **settings), expected)
    handle.remove()
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)


def test_a_cache_with_documents_is_refused_and_one_that_nobody_asked_for_is_not(adapted, plain):
    # Its name before 5.24, which later versions take as well.
    cache = {"past_key_values": DynamicCache(config=adapted.config)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in ({**ROW, **cache}, {**ROW, "use_cache": True}, {**shard_batch(ROW, MESH), **cache}):
            with pytest.raises(ValueError, match="a cache holds one document a row"):
                adapted(**batch)
    torch.testing.assert_close(adapted(**shard_batch(ROW, MESH)).logits, logits_alone(plain, ROW))


def test_a_cache_with_shared_rows_is_refused():
    model, cache = build_hybrid("ulysses"), {"past_key_values": DynamicCache()}
    attach_adapters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="a cache was passed with rows that 2 ranks share"):
            model(**cut_batch({"input_ids": draw(1, 8)}, 2, 0), **cache)


# What is around the layers


def test_a_layer_or_decoder_by_itself(adapted, plain):
    with pytest.raises(RuntimeError, match="`Lfm2ShortConv` was called outside of a forward of its model"):
        adapted.model.layers[0].conv(torch.zeros(1, 3, 32, dtype=torch.float64))
    hidden = adapted.model(**ROW, use_cache=False).last_hidden_state
    torch.testing.assert_close(adapted.lm_head(hidden), logits_alone(plain, ROW), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", ["ours", "tiles"])
def test_a_tiled_loss_and_peft_around_it(plain, first):
    peft = pytest.importorskip("peft")
    model = build_hybrid("packed")
    if first == "tiles":
        tile_loss(model, 5)
    attach_adapters(model)
    if first == "ours":
        tile_loss(model, 5)
    labels = torch.where(ROW["position_ids"] == 0, -100, ROW["input_ids"])
    expected = plain.loss_function(logits_alone(plain, ROW), labels, vocab_size=97)
    torch.testing.assert_close(model(**ROW, labels=labels, use_cache=False).loss.double(), expected.double())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "q_proj"]))
    wrapped.enable_input_require_grads()
    wrapped.gradient_checkpointing_enable()
    loss = wrapped.train()(**ROW, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss.double(), expected.double())
    loss.backward()


def test_weights_that_are_offloaded_after_it_are_found(plain):
    model = build_hybrid("packed")
    adapt(model, MESH)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(**ROW, use_cache=False).logits, logits_alone(plain, ROW))


def test_hooks_of_offloading_that_came_before_are_refused():
    model = build_hybrid("packed")
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    attach_adapters(model)
    with pytest.raises(NotImplementedError, match="attach the adapters before other tools"):
        model(**ROW, use_cache=False)
    away = build_hybrid("packed")
    cpu_offload(away, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="weights of `Lfm2ForCausalLM` are on the meta device"):
        adapt(away, MESH)


def test_a_copy_in_another_precision_and_a_second_model_are_their_own(adapted, plain):
    other, third = copy.deepcopy(adapted).float(), build_hybrid("packed")
    torch.testing.assert_close(
        other(**ROW, use_cache=False).logits.double(), logits_alone(plain, ROW), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(NotImplementedError, match="layers of type conv"):
        third(**ROW, use_cache=False)


# The functions alone


@pytest.mark.parametrize("kernel", [1, 2, 4, 40])
@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"bias": True, "activation": "silu"}])
def test_a_convolution_starts_anew_at_every_document(kernel, settings):
    original = _convolution
    batch = packed_rows(*PACKED)
    shard = cut_batch(batch, 1, 0)["sequence_shard"]
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(shape, generator=generator).double() for shape in ((2, 5, 23), (5, kernel)))
    bias = torch.randn(5, generator=generator).double() if settings.get("bias") else None
    activation = settings.get("activation")
    outputs = convolve(original, pieces_of(shard, 2, "cpu"), inputs, weight, bias, activation, seq_idx=None)
    for row, lengths in enumerate(PACKED):
        alone = [original(part[None], weight, bias, activation)[0] for part in inputs[row].split(lengths, dim=-1)]
        torch.testing.assert_close(outputs[row], torch.cat(alone, dim=-1))


def _convolution(hidden_states, weight, bias=None, activation=None, **kwargs):
    outputs = torch.nn.functional.conv1d(
        hidden_states, weight[:, None], bias, padding=weight.shape[-1] - 1, groups=len(weight)
    )[..., : hidden_states.shape[-1]]
    return outputs if activation is None else torch.nn.functional.silu(outputs)


@pytest.mark.parametrize("reach", [0, 1, 3, 30])
def test_a_window_starts_anew_at_every_document(reach):
    layer = functools.partial(window_layer, reach=reach)
    batch = packed_rows(*PACKED)
    pieces = pieces_of(cut_batch(batch, 1, 0)["sequence_shard"], 2, "cpu")
    inputs = torch.rand(2, 23, 4, generator=torch.Generator().manual_seed(0)).double()
    outputs = run_window(layer, pieces, reach, {"hidden_states": inputs, "conv_mask": None}, "conv_mask")
    for row, lengths in enumerate(PACKED):
        alone = [layer(part[None]) for part in inputs[row].split(lengths)]
        for output, expected in zip(outputs, zip(*alone)):
            torch.testing.assert_close(output[row], torch.cat(expected, dim=1)[0])


def test_pieces_of_a_share():
    batch = packed_rows(*PACKED)
    pieces = [pieces_of(cut_batch(batch, 4, rank)["sequence_shard"], 2, "cpu") for rank in range(4)]
    assert [each.lengths for each in pieces] == [((6,), (2, 4)), ((1, 5), (6,)), ((6,), (6,)), ((5, 1), (5, 1))]
    assert [each.continues for each in pieces] == [(False, False), (False, True), (True, False), (True, True)]
    assert pieces[2].passes_through == (True, False) and not pieces[2].is_whole
    alone = pieces_of(cut_batch({"input_ids": draw(2, 5)}, 1, 0)["sequence_shard"], 2, "cpu")
    assert alone.is_whole and alone.lengths == ((5,), (5,))


# Layers without an adapter


def test_a_layer_without_an_adapter_is_named_with_the_file_to_add_one(monkeypatch):
    model = build_hybrid("ulysses")
    assert unfollowed_layers(model) == []
    monkeypatch.setattr("hf_longctx.adapters.recurrent.layers.RULES", {})
    assert unfollowed_layers(model) == ["conv (`Lfm2ShortConv`)"]
    with pytest.raises(NotImplementedError, match=r"conv \(`Lfm2ShortConv`\).*`adapters/recurrent/layers.py`"):
        validate_config("Lfm2ForCausalLM", model.config, unfollowed_layers(model))


def test_ranks_that_do_not_exist_get_shapes():
    local = torch.zeros(2, 3, requires_grad=True)
    gathered = gather_shares(local, ImaginaryRanks(1, 4))
    assert gathered.shape == (4, 2, 3)
    gathered.sum().backward()
    assert local.grad.shape == (2, 3)

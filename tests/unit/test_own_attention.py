"""Attention layers with a code of their own on one process: transformers' forward, packed rows, what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, DynamicCache

from hf_longctx import SequenceMesh, adapt
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.instance_forward import patches_on
from hf_longctx.adapters.own_attention.own_layers import follow_own_attention
from hf_longctx.adapters.pass_shard import ForwardRows
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.parallel.shard import cut_batch
from hf_longctx.proof.model_under_test import default_config
from hf_longctx.proof.tiny import shrink

from ..own_attention import (
    CASES,
    LENGTHS,
    TOKENS,
    TOLERANCE,
    difference,
    forward,
    gradients_of,
    model_of,
    one_process,
    projection,
    rows_of,
)


# Whose attention runs ours without a shard, too.
ON_THE_INTERFACE = ("nemotron", "stablelm", "falcon alibi", "falcon alibi, 6 heads, key form")


def adapted(case: str, attention: str = "packed") -> torch.nn.Module:
    model = model_of(case, attention)
    attach_adapters(model)
    return model


@pytest.mark.parametrize("case", CASES)
def test_whole_rows_are_transformers_own_and_removing_leaves_nothing(case):
    reference, model = model_of(case, "eager"), model_of(case, "packed")
    batch = rows_of(case, "left", model.config)
    expected = forward(reference, batch)
    handle = attach_adapters(model)
    assert handle.modules
    actual = forward(model, batch)
    if case in ON_THE_INTERFACE:
        real = batch["attention_mask"][..., None]
        assert difference(actual * real, expected * real) <= TOLERANCE
    else:
        assert torch.equal(actual, expected)
    handle.remove()
    assert not any(patches_on(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


BOUNDS = torch.nn.functional.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(torch.int32)


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_are_their_documents_on_one_process(case):
    reference, model = model_of(case, "eager"), adapted(case)
    batch = rows_of(case, "packed", model.config)
    expected = one_process(reference, batch)
    weights = projection(batch, expected.shape[-1])
    theirs = gradients_of(reference, (expected * weights).sum())
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    longest = {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    for told in ({}, {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, **longest}):
        actual = forward(model, {**batch, **told})
        assert difference(actual, expected.detach()) <= TOLERANCE
        ours = gradients_of(model, (actual * weights).sum())
        assert ours.keys() == theirs.keys()
        assert max(difference(ours[name], theirs[name], largest) for name in theirs) <= TOLERANCE


@pytest.mark.parametrize("case", ["gpt_neo", "megatron-bert", "roformer"])
def test_recomputed_layers_know_their_rows(case):
    model = adapted(case).train()
    batch = rows_of(case, "packed", model.config)
    outputs = forward(model, batch)
    weights = projection(batch, outputs.shape[-1])
    expected = gradients_of(model, (outputs * weights).sum())
    model.gradient_checkpointing_enable()
    actual = gradients_of(model, (forward(model, batch) * weights).sum())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_dropout_of_attention_is_drawn_once_a_step():
    model = adapted("lilt").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(forward(model, rows_of("lilt", "packed", model.config)))
    assert torch.equal(*outputs[:2]) and not torch.equal(*outputs[1:])


def test_a_layer_of_a_class_of_ones_own_is_left_alone():
    model = model_of("megatron-bert", "packed")
    layer = model.bert.encoder.layer[0].attention.self

    class Mine(type(layer)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    layer.__class__ = Mine
    follow_own_attention(model)
    patched = [bool(patches_on(layer.attention.self)) for layer in model.bert.encoder.layer]
    assert patched == [False, True]


# What is refused


def refused(case: str, error: type[Exception], words: str, model=None, **more) -> None:
    model = adapted(case) if model is None else model
    with pytest.raises(error, match=words):
        forward(model, {**rows_of(case, "packed", model.config), **more})


def test_other_sequences_are_refused():
    other = torch.zeros(1, 5, 64)
    refused("trocr", NotImplementedError, "`encoder_hidden_states`", encoder_hidden_states=other)


def test_entities_of_luke_are_refused():
    entities = {"entity_ids": torch.ones(1, 2, dtype=torch.long), "entity_position_ids": torch.ones(1, 2, 3).long()}
    refused("luke", NotImplementedError, "LUKE's entities", **entities)


def test_quantized_ibert_is_refused():
    model = adapted("ibert")
    for module in model.modules():
        if type(module).__name__ == "IBertSelfAttention":
            module.quant_mode = True
    refused("ibert", NotImplementedError, "`quant_mode` True", model)


def test_prompts_of_mvp_are_refused():
    model = adapted("mvp")
    layer = model.model.decoder.layers[0].self_attn
    prompt = torch.zeros(2, layer.num_heads, 3, layer.head_dim)
    add = lambda module, args, kwargs: (args, {**kwargs, "attn_prompt": prompt})
    layer.register_forward_pre_hook(add, with_kwargs=True)
    refused("mvp", NotImplementedError, "`use_prompt`", model)


def test_block_sparse_big_bird_is_refused_on_packed_rows_and_by_adapt():
    config = shrink(default_config("big_bird"))
    config.block_size, config.num_random_blocks = 1, 1
    model = AutoModel.from_config(config, attn_implementation="packed").eval()
    attach_adapters(model)
    refused("big_bird", NotImplementedError, "attention_type='original_full'", model)
    adapt(model, SequenceMesh.build())
    refused("big_bird", NotImplementedError, "attention_type='original_full'", model)


@pytest.mark.parametrize("case", ["gpt_neo", "stablelm"])
def test_caches_are_refused(case):
    model = adapted(case)
    cache = {OUTPUT_NAME: DynamicCache(config=model.config), "use_cache": True}
    refused(case, ValueError, "`use_cache`", model, **cache)


@pytest.mark.parametrize("case", ["xlm", "flaubert"])
def test_padding_that_only_the_tokens_tell_is_refused(case):
    model = adapted(case)
    batch = rows_of(case, "packed", model.config)
    refused(case, ValueError, "`lengths`", model, lengths=torch.tensor([TOKENS]))
    batch["input_ids"][0, 2] = model.config.pad_index
    refused(case, ValueError, "`pad_index`", model, **batch)


def test_cells_of_tables_are_refused_where_positions_count_on():
    model = adapted("tapas")
    cells = torch.zeros(1, TOKENS, 7, dtype=torch.long)
    forward(model, {**rows_of("tapas", "packed", model.config), "token_type_ids": cells})
    cells[0, 5:, 1] = 1
    refused("tapas", NotImplementedError, "`reset_position_index_per_cell`", model, token_type_ids=cells)
    batch = {"input_ids": rows_of("tapas", "dense", model.config)["input_ids"][:1]}
    share = cut_batch({**batch, "token_type_ids": cells}, 1, 0)
    expected = forward(model_of("tapas", "eager"), {**batch, "token_type_ids": cells})
    assert difference(forward(model, share), expected) <= TOLERANCE  # a whole row counts its cells itself


def test_documents_longer_than_the_table_of_positions_are_refused():
    model = adapted("roformer")
    tokens = model.config.max_position_embeddings + 1
    ids = torch.full((1, tokens + 3), 11)
    positions = torch.cat([torch.arange(tokens), torch.arange(3)])[None]
    with pytest.raises(ValueError, match="`RoFormerSinusoidalPositionalEmbedding` has positions for"):
        model(input_ids=ids, position_ids=positions)


def test_kernels_that_would_drop_numbers_of_distances_are_refused():
    model = adapted("mpnet")
    batch = rows_of("mpnet", "packed", model.config)
    expected = forward(model, batch)
    assert difference(forward(model, cut_batch(batch, 1, 0, inner_attention="eager")), expected) <= TOLERANCE
    for attention in model.modules():
        if isinstance(attention, torch.nn.Dropout):
            attention.p = 0.1
    with pytest.raises(NotImplementedError, match="`distance_bias`"):
        forward(model.train(), cut_batch(batch, 1, 0, inner_attention="flex_attention"))


def test_padding_inside_a_document_and_windows_of_distances():
    model, reference = adapted("mpnet"), model_of("mpnet", "eager")
    batch = rows_of("mpnet", "left", model.config)
    batch["attention_mask"][1, 4:6] = 0
    share = cut_batch(batch, 1, 0)
    real = batch["attention_mask"][..., None]
    assert difference(forward(model, share) * real, forward(reference, batch) * real) <= TOLERANCE


@pytest.mark.parametrize("case", ["xglm", "trocr sinusoidal"])
def test_tables_are_as_long_as_whole_rows_need(case):
    tables = [m for m in adapted(case).modules() if hasattr(m, "get_embedding") and patches_on(m)]
    (table,) = tables
    known = len(table.weights)
    ids = torch.full((1, known + 5), 11)
    (patch,) = patches_on(table)
    patch.rows = ForwardRows(cut_batch({"input_ids": ids}, 1, 0)["sequence_shard"], None, None, False)
    given = torch.arange(known + 5)[None] if case == "xglm" else ids
    longer = table.get_embedding(known + 50, table.embedding_dim, table.padding_idx)
    first = table.offset if case == "xglm" else table.padding_idx + 1
    assert torch.equal(table(given)[0], longer[first : first + known + 5].to(table.weights))

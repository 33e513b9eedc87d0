"""Packed rows shared by two and four ranks equal documents taken one by one: loss and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hf_longctx import SequenceMesh, assert_no_cross_document, explain_attention, gather_sequence, shard_batch
from hf_longctx.adapters.positions import follow_positions

from ..models import MASKED_LM, build
from ..unit.test_packed import assert_same, documents_of, gradients, one_by_one, pack, weights_like


LENGTHS = {
    "ragged": (9, 1, 13, 40, 2, 9),
    "64 documents": tuple(3 + index % 5 for index in range(64)),
    "over three shards": (3, 17, 3),
    "single tokens": (1,) * 11,
    "shorter than the world": (1, 2),
}
EAGER = ("gemma2", "gpt_oss")


def sharded(name: str, lengths, size: int, dtype: torch.dtype, inner: str = "auto"):
    """Logits of whole rows, summed gradients of a projection, the summed loss and its summed gradients."""
    model = build(name, "ulysses", dtype).eval()
    follow_positions(model)  # of most nothing is changed
    mesh = SequenceMesh.build(size)
    full = pack(documents_of(lengths, name), name)
    share = shard_batch(full, mesh, shift_labels=name not in MASKED_LM, inner_attention=inner)
    shard = share["sequence_shard"]
    targets = share.pop("labels") if name in MASKED_LM else share.pop("shift_labels")
    inputs = {key: value for key, value in share.items() if "labels" not in key and key != "num_items_in_batch"}
    logits = model(**inputs).logits
    whole = weights_like(torch.zeros(1, shard.num_tokens, logits.shape[-1], dtype=dtype), 7)
    whole = F.pad(whole, (0, 0, 0, shard.local_len * size - shard.num_tokens))
    mine = whole[:, shard.rank * shard.local_len :][:, : shard.local_len]
    (logits * mine).sum().backward(retain_graph=True)
    projected = gradients(model)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    loss.backward()
    trained, loss = gradients(model), loss.detach()
    for tensor in [loss, *projected.values(), *trained.values()]:
        dist.all_reduce(tensor, group=mesh.sp_group)
    return gather_sequence(logits, mesh.sp_group)[:, : shard.num_tokens], projected, loss, trained


MODELS = ["llama", "mistral", "gemma2", "gpt_oss", "llama4", "deepseek_v3", "bert", "modernbert", "bart", "marian"]


CASES = [(name, "ragged") for name in MODELS] + [(name, "64 documents") for name in ("llama", "modernbert")]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_sharded_documents_equal_separate_ones(worlds, name, layout, size):
    dtype, tolerance = (torch.float32, 3e-6) if name in (*EAGER, "llama4") else (torch.float64, 1e-6)
    expected = one_by_one(name, documents_of(LENGTHS[layout], name), dtype)
    for actual in worlds(size).run(sharded, name, LENGTHS[layout], size, dtype):
        assert_same(actual, expected, tolerance)


@pytest.mark.parametrize("layout", ["over three shards", "single tokens", "shorter than the world"])
@pytest.mark.parametrize("name", ["llama", "mistral", "modernbert"])
def test_documents_across_shards_and_tiny_ones(world4, name, layout):
    expected = one_by_one(name, documents_of(LENGTHS[layout], name), torch.float64)
    for actual in world4.run(sharded, name, LENGTHS[layout], 4, torch.float64):
        assert_same(actual, expected, 1e-6)


def test_a_document_really_spans_three_shards():
    bounds = [0, 3, 20, 23]
    shards = {token // 6 for token in range(bounds[1], bounds[2])}
    assert shards == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_float32_is_held_to_one_part_in_a_million(world2, name):
    expected = one_by_one(name, documents_of(LENGTHS["ragged"], name))
    for actual in world2.run(sharded, name, LENGTHS["ragged"], 2, torch.float32):
        assert_same(actual, expected, 1e-6)


def test_eager_kernel_takes_documents_too(world2):
    expected = one_by_one("llama", documents_of(LENGTHS["ragged"]))
    for actual in world2.run(sharded, "llama", LENGTHS["ragged"], 2, torch.float32, "eager"):
        assert_same(actual, expected, 1e-6)


def check_and_explain(name: str, size: int, attention: str):
    mesh = SequenceMesh.build(size)
    model = build(name, attention).eval()
    full = pack(documents_of(LENGTHS["ragged"], name), name)
    full.pop("use_cache", None)
    assert_no_cross_document(model, full, mesh)
    return str(explain_attention(model, shard_batch(full, mesh)))


@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_leak_check_and_explanation_under_sharding(world2, name):
    for text in world2.run(check_and_explain, name, 2, "ulysses"):
        assert "6 segments of 1 to 40 tokens: 6 blocks in 5 calls" in text


def leaky(size: int):
    """A model whose first layer shows a rank's own tokens to all of them, documents or not."""
    mesh = SequenceMesh.build(size)
    model = build("llama", "ulysses").eval()
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output + 0.1 * output.mean(1, keepdim=True))
    full = pack(documents_of((9, 1, 13)))
    full.pop("use_cache")
    try:
        assert_no_cross_document(model, full, mesh)
    except AssertionError as error:
        return str(error)


def test_leak_under_sharding_is_found_by_every_rank(world2):
    for message in world2.run(leaky, 2):
        assert message is not None and "see each other" in message


def share_for_packed(size: int):
    mesh = SequenceMesh.build(size)
    full = pack(documents_of((9, 14)))
    try:
        build("llama", "packed")(**shard_batch(full, mesh))
    except ValueError as error:
        return str(error)


def test_packed_refuses_a_share_of_a_row(world2):
    for message in world2.run(share_for_packed, 2):
        assert "set_attn_implementation('ulysses')" in message

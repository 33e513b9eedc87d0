"""LSH attention on rows that ranks share: to the bit those of one process, and so are loss and gradients of models."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from hf_longctx import LSHConfig, SequenceMesh, adapt, gather_sequence, shard_batch
from hf_longctx.attention.deferred import DeferredMask
from hf_longctx.attention.ulysses import ulysses_attention
from hf_longctx.config.lsh_settings import LSH_KEY
from hf_longctx.parallel.shard import cut_batch
from hf_longctx.proof import compare
from hf_longctx.proof.model_under_test import ModelUnderTest, Setting
from hf_longctx.proof.verification import merge

from ..hashed import build_hashed, build_with_norms
from ..training import assert_same_trajectory, train
from .test_attention import RULES, TOKENS, assemble, inputs, row_batch, weights_of
from .test_models_exact import assert_same, gradients, make_batch, upstream


SIZES = (2, 4)
ROWS = ("whole", "packed", "left", "right")
CASES = [*itertools.product(("causal", "reformer"), ROWS, ("causal", "bidirectional"), (0.0,))]
CASES += [("causal", "packed", "causal", 0.3), ("reformer", "left", "bidirectional", 0.3)]


def attend(case, size: int, rank: int, mesh: SequenceMesh | None):
    """Output and gradients of one rank's tokens, and how many they are; every head has rotations of its own."""
    layout, segments, rule, dropout = case
    query, _, value, upstream_ = inputs(5, 5, torch.float64, 6)
    shard = cut_batch(row_batch(segments), size, rank, inner_attention="lsh")["sequence_shard"]
    shard = shard if mesh is None else shard.bind(mesh)
    missing, start = shard.local_len * size - TOKENS, rank * shard.local_len

    def cut(tensor, dim):
        tensor = torch.nn.functional.pad(tensor.transpose(dim, -1), (0, missing)).transpose(dim, -1)
        return tensor.narrow(dim, start, shard.local_len).contiguous()

    mine = [cut(tensor, 2).requires_grad_() for tensor in (query, value)]
    mask = DeferredMask({"mask_function": RULES[rule][1](torch.zeros(2)), "batch_size": 2})
    weights = cut(weights_of(upstream_, segments), 1)
    settings = LSHConfig(num_hashes=3, window=3, num_buckets=4, layout=layout).to_dict()
    module = torch.nn.Module()
    module.config, module.layer_idx = SimpleNamespace(**{LSH_KEY: settings}), 3
    torch.manual_seed(2)
    output, _ = ulysses_attention(module, mine[0], mine[0], mine[1], mask, dropout, sequence_shard=shard)
    (output * weights).sum().backward()
    nothing = torch.zeros_like(mine[0])
    return [output.detach() * (weights != 0), mine[0].grad, mine[1].grad, nothing], shard.num_local_tokens


def attend_on_ranks(size: int):
    mesh = SequenceMesh.build(size)
    return [attend(case, size, mesh.sequence_parallel_rank, mesh) for case in CASES]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_compute_the_same_to_the_bit(worlds, size):
    for case, results in zip(CASES, zip(*worlds(size).run(attend_on_ranks, size))):
        expected, _ = attend(case, 1, 0, None)
        for name, ours, theirs in zip(("output", "query", "value"), assemble(results), expected):
            assert torch.equal(ours, theirs), f"{case}: {name}"


MODELS = {
    ("causal", torch.float64): ("full", "left", "packed", "tiny"),
    ("causal", torch.float32): ("full", "right", "left", "packed", "tiny"),
    ("reformer", torch.float64): ("left", "packed"),
    ("reformer", torch.float32): ("packed", "tiny"),
}


def numbers(model, batch, weights, mine, shard=None, mesh=None):
    """Logits, gradients under random weights, loss and its gradients; of the whole rows on each rank."""
    settings = {} if shard is not None else {"use_cache": False}
    outputs = model(**batch, **settings)
    (outputs.logits * mine).sum().backward()
    found = [gradients(model)]
    model.zero_grad()
    loss = model(**batch, **settings).loss
    loss.backward()
    found.append(gradients(model))
    model.zero_grad()
    if shard is None:
        return outputs.logits.detach() * (weights != 0), found[0], loss.detach(), found[1]
    loss = loss.detach() / shard.size
    for tensor in (loss, *found[0].values(), *found[1].values()):
        dist.all_reduce(tensor, group=mesh.sp_group)
    for gradient in found[1].values():
        gradient /= shard.size
    logits = gather_sequence(outputs.logits.detach() * (mine != 0), mesh.sp_group)[:, : shard.num_tokens]
    return logits, found[0], loss, found[1]


def on_one_process(layout: str, dtype, kind: str):
    model, batch = build_hashed(layout=layout, dtype=dtype), make_batch(kind, "llama")
    weights = upstream(batch, dtype)
    return numbers(model, batch, weights, weights)


def on_ranks(size: int):
    mesh, found = SequenceMesh.build(size), {}
    for (layout, dtype), kinds in MODELS.items():
        model = build_hashed("ulysses", layout, dtype)
        adapt(model, mesh, inner_attention="lsh")
        for kind in kinds:
            full = make_batch(kind, "llama")
            batch, weights = shard_batch(full, mesh, model), upstream(full, dtype)
            shard = batch["sequence_shard"]
            weights = torch.nn.functional.pad(weights, (0, 0, 0, shard.local_len * size - weights.shape[1]))
            mine = weights[:, shard.rank * shard.local_len :][:, : shard.local_len]
            found[layout, dtype, kind] = numbers(model, batch, weights, mine, shard, mesh)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_models_on_shares_are_those_of_one_process(worlds, size):
    ranks = worlds(size).run(on_ranks, size)
    for layout, dtype, kind in ranks[0]:
        expected = on_one_process(layout, dtype, kind)
        for found in ranks:
            actual = found[layout, dtype, kind]
            if dtype == torch.float64:  # the loss is computed in float32
                bar = 1e-10 if layout == "reformer" else 1e-12
                assert_same((*actual[:2], *expected[2:]), expected, bar)
            assert_same(actual, expected, 1e-5 if dtype == torch.float32 else 1e-6)


def hashed(_: torch.nn.Module) -> torch.nn.Module:
    return build_with_norms("lsh")


def train_on_two():
    return train(2, prepare=lambda _: build_with_norms("ulysses"), context={"inner_attention": "lsh"})


def test_training_is_that_of_one_process(world2):
    expected = train(0, prepare=hashed)
    for actual in world2.run(train_on_two):
        assert_same_trajectory(actual, expected)


def refusals():
    mesh, messages = SequenceMesh.build(2), []
    for attention, ties in (("lsh", True), ("ulysses", False)):
        try:
            adapt(build_with_norms(attention, ties=ties), mesh, inner_attention="lsh")
        except (ValueError, NotImplementedError) as error:
            messages.append(str(error))
    return messages


def test_ranks_refuse_before_the_first_step(world2):
    for whole, untied in world2.run(refusals):
        assert "`model.set_attn_implementation('ulysses')` and pass `inner_attention` 'lsh'" in whole
        assert "call `hf_longctx.tie_query_key(model)`" in untied


def test_verify_compares_lsh_with_lsh(world2):
    config = LlamaConfig()
    tested = ModelUnderTest.of(config, None, 2, inner_attention="lsh")
    results = merge(world2.run(compare.prove, tested, Setting(2, inner_attention="lsh", kinds=("dense", "packed"))))
    for rows in results:
        assert rows.outcome == "exact", rows
        assert rows.errors.worst <= rows.tolerance < rows.baseline / 100
        assert rows.full_attention > 1e-2  # told, and no part of the outcome
    grouped = ModelUnderTest.of(LlamaConfig(num_key_value_heads=8), None, 2, inner_attention="lsh")
    (rows,) = merge(world2.run(compare.prove, grouped, Setting(2, inner_attention="lsh", kinds=("dense",))))
    assert rows.outcome == "refused" and "8 key/value heads for 32 query heads" in rows.message

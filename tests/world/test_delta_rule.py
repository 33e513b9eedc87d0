"""Delta rules on rows that ranks share: outputs and all gradients are one process's, by states and by heads.

The reference is transformers' own model on whole rows in float32, which these functions compute in whatever they are
given. Errors are held to what rounding leaves of 46 tokens, or to twice the reference's own between two chunk sizes.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from hf_longctx import SequenceMesh, explain_attention, gather_sequence, shard_batch
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.recurrent import layers
from hf_longctx.adapters.recurrent.delta_rule import delta_rule
from hf_longctx.proof import compare
from hf_longctx.proof.model_under_test import ModelUnderTest, Setting
from hf_longctx.proof.result import tolerance
from hf_longctx.proof.verification import merge

from ..hybrids import build, gradients, noise_of, one_process, rows_of, upstream, worst


DELTA_RULES = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")
ROWS = {
    "7": rows_of(7),
    "45": rows_of(45),
    "150": rows_of(150, rows=1),  # more than a chunk
    "left": rows_of(45, left=30),  # a rank with nothing but padding
    "packed": rows_of(1, 9, 1, 21, 13),
    "fill": rows_of(2, 3),  # four ranks: the last has nothing but fill
    "short": rows_of(*[2] * 12),  # documents shorter than a share
}


def forced(exchange):
    """Delta rules that exchange this; `None` is their own choice."""
    return {name: functools.partial(delta_rule, exchange=exchange) for name in DELTA_RULES}


def shared(model, batch, mesh):
    """Logits of whole rows and gradients of all ranks."""
    share, weights = shard_batch(batch, mesh), upstream(batch)
    shard = share["sequence_shard"]
    whole = torch.nn.functional.pad(weights, (0, 0, 0, shard.local_len * shard.size - weights.shape[1]))
    mine = whole[:, shard.rank * shard.local_len :][:, : shard.local_len]
    logits = model(**share, use_cache=False).logits
    (logits * mine).sum().backward()
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient, group=mesh.sp_group)
    return gather_sequence(logits.detach() * (mine != 0), mesh.sp_group)[:, : shard.num_tokens], found


def on_the_world(name, exchanges, kinds, size):
    mesh, model, before = SequenceMesh.build(size), build(name), dict(layers.RULES)
    attach_adapters(model)
    results = []
    try:
        for exchange in exchanges:
            layers.RULES.update(forced(exchange))
            results.append([shared(model, ROWS[kind], mesh) for kind in kinds])
    finally:
        layers.RULES.update(before)
    return results


CASES = [
    ("qwen3_next", 2, ("heads", "states"), tuple(ROWS)),
    ("qwen3_next", 4, ("heads", "states"), ("45", "packed", "fill", "short")),
    ("olmo_hybrid", 2, (None,), ("45", "packed")),
    ("qwen3_5_text", 2, (None,), ("45", "left")),
    ("qwen3_5_moe_text", 2, (None,), ("packed",)),
    ("kimi_linear", 2, ("heads", "states"), ("packed",)),
]


@pytest.mark.parametrize(("name", "size", "exchanges", "kinds"), CASES)
def test_ranks_that_share_rows_equal_one_process(worlds, name, size, exchanges, kinds):
    model = build(name, "sdpa")
    expected = {kind: one_process(model, ROWS[kind]) for kind in kinds}
    noise = {kind: noise_of(model, ROWS[kind], expected[kind]) for kind in kinds}
    for rank, answers in enumerate(worlds(size).run(on_the_world, name, exchanges, kinds, size)):
        for exchange, numbers in zip(exchanges, answers, strict=True):
            for kind, actual in zip(kinds, numbers, strict=True):
                errors = worst(actual, expected[kind])
                place = f"{kind} rows by {exchange} on rank {rank}: {errors}, noise {noise[kind]:.1e}"
                assert errors["logits"] <= tolerance(8), place
                assert errors["worst"] <= max(tolerance(46), 2 * noise[kind]), place


def checkpointed(name, exchange):
    """Numbers of rows whose layers are recomputed in backward, both ways, and of LoRA's weights."""
    mesh, before = SequenceMesh.build(2), dict(layers.RULES)
    layers.RULES.update(forced(exchange))
    try:
        results = []
        for reentrant in (None, False, True):
            model = build(name)
            attach_adapters(model)
            if reentrant is not None:
                model.train()
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            results.append(shared(model, ROWS["packed"], mesh))
        return results
    finally:
        layers.RULES.update(before)


@pytest.mark.parametrize("exchange", ["heads", "states"])
def test_layers_that_are_recomputed_get_the_same_gradients(world2, exchange):
    for plain, *others in world2.run(checkpointed, "qwen3_next", exchange):
        for other in others:
            assert worst(other, plain)["worst"] <= 1e-6


def with_lora(exchange):
    import peft

    mesh, before = SequenceMesh.build(2), dict(layers.RULES)
    config = peft.LoraConfig(r=4, target_modules=["in_proj_qkvz", "out_proj"], init_lora_weights=False)
    layers.RULES.update(forced(exchange))
    try:
        model = _lora(build("qwen3_next"), config)
        attach_adapters(model)
        theirs = _lora(build("qwen3_next", "sdpa"), config)
        return worst(shared(model, ROWS["packed"], mesh), one_process(theirs, ROWS["packed"]))
    finally:
        layers.RULES.update(before)


def _lora(model, config):
    import peft

    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


def test_lora_on_the_layers_that_carry_a_state(world2):
    pytest.importorskip("peft")
    for errors in world2.run(with_lora, "states"):
        assert errors["worst"] <= 2e-5 and errors["logits"] <= 1e-6, errors


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_loops_with_a_wrapper_and_two_groups_are_exact(world4, wrapper):
    setting = Setting(2, 2, kinds=("dense", "packed"), wrapper=wrapper)
    tested = ModelUnderTest.of(build("qwen3_next").config, None, 2)
    results = merge(world4.run(compare.prove, tested, setting))
    assert {rows.outcome for rows in results} == {"exact"}, results


def sent_and_said(exchange):
    """Bytes that leave this rank in delta rules, forward and backward, and what `explain_attention` says."""
    mesh, model, sent, before = SequenceMesh.build(2), build("qwen3_next"), [], dict(layers.RULES)
    attach_adapters(model)
    layers.RULES.update(forced(exchange))
    layers.RULES["causal_conv1d_fn"] = lambda original, pieces, *args, **_: original(*args, activation="silu")
    model.model.layers = model.model.layers[:1]
    plain = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather", "reduce_scatter")}
    own, size = dist.get_rank(mesh.sp_group), mesh.sequence_parallel_size

    def trade(received, buffer, receive, send, group):
        sent.append(buffer.element_size() * (sum(send) - send[own]))
        return plain["all_to_all_single"](received, buffer, receive, send, group=group)

    def gather(parts, local, group):
        sent.append(local.nbytes * (size - 1))
        return plain["all_gather"](parts, local, group=group)

    def scatter(mine, parts, group):
        sent.append(mine.nbytes * (size - 1))
        return plain["reduce_scatter"](mine, parts, group=group)

    share = shard_batch(ROWS["45"], mesh)
    try:
        dist.all_to_all_single, dist.all_gather, dist.reduce_scatter = trade, gather, scatter
        model(**share, use_cache=False).logits.sum().backward()
        plan = next(iter(share["sequence_shard"].layer_plans.values()))()
    finally:
        layers.RULES.update(before)
        for name, function in plain.items():
            setattr(dist, name, function)
    return sum(sent), str(plan), str(explain_attention(model, shard_batch(ROWS["45"], mesh)))


@pytest.mark.parametrize("exchange", ["heads", "states"])
def test_the_bytes_that_are_sent_are_those_that_explain_attention_says(world2, exchange):
    for sent, plan, explained in world2.run(sent_and_said, exchange):
        words = {"heads": "trade tokens for heads", "states": "hand states on"}[exchange]
        assert f"ranks {words}, {sent:,} bytes a rank, forward and backward" in plan
        assert "one document of 45 tokens a row" in plan
        assert "recurrent: torch_chunk_gated_delta_rule" in explained and "bytes a rank" in explained


def with_more_ranks_than_heads(exchange):
    mesh, before = SequenceMesh.build(4), dict(layers.RULES)
    model = build("qwen3_next", linear_num_key_heads=1, linear_num_value_heads=2)
    attach_adapters(model)
    layers.RULES.update(forced(exchange))
    try:
        return shared(model, ROWS["packed"], mesh)
    except ValueError as error:
        return str(error)
    finally:
        layers.RULES.update(before)


def test_more_ranks_than_recurrent_heads_hand_states_on(world4):
    model = build("qwen3_next", "sdpa", linear_num_key_heads=1, linear_num_value_heads=2)
    expected = one_process(model, ROWS["packed"])
    for actual in world4.run(with_more_ranks_than_heads, None):
        errors = worst(actual, expected)
        assert errors["worst"] <= max(tolerance(46), 2 * noise_of(model, ROWS["packed"], expected)), errors
    for message in world4.run(with_more_ranks_than_heads, "heads"):
        assert "shares the 2 heads of `torch_chunk_gated_delta_rule` among 4 ranks" in message

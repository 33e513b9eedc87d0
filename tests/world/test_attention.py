"""The registered function itself against its slow reference: rules, heads, kernels and side inputs, with random
upstream gradients.

Operators agree to 1e-6 of the largest entry in fp32, and to 1e-12 in fp64 where the kernel keeps that precision
(`sdpa`; the eager softmax is taken in fp32 everywhere).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import masking_utils

from hf_longctx import SequenceMesh
from hf_longctx.attention.deferred import DeferredMask
from hf_longctx.attention.reference import reference_attention
from hf_longctx.attention.ulysses import ulysses_attention
from hf_longctx.parallel.shard import SequenceShard, cut_batch


RULES = {
    "causal": ({"causal": True}, lambda zeros: masking_utils.causal_mask_function),
    "bidirectional": ({"causal": False}, lambda zeros: masking_utils.bidirectional_mask_function),
    "window": ({"causal": True, "window": 4}, lambda zeros: masking_utils.sliding_window_causal_mask_function(4)),
    "window_both": (
        {"causal": False, "window": 3},
        lambda zeros: masking_utils.sliding_window_bidirectional_mask_function(3),
    ),
    "chunk": ({"causal": True, "chunk": 5}, lambda zeros: masking_utils.chunked_causal_mask_function(5, zeros)),
}
SEGMENTS = {
    "whole": None,
    "packed": [[0] * 5 + [1] + [2] * 7, [0] * 2 + [1] * 11],
    "left": [[-1] * 4 + [0] * 9, [-1] * 1 + [0] * 12],
    "right": [[0] * 9 + [-1] * 4, [0] * 13],
}
TOKENS = 13


def inputs(heads: int, key_value_heads: int, dtype: torch.dtype, value_size: int):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, 8), (key_value_heads, 8), (key_value_heads, value_size), (heads, value_size))
    tensors = [torch.randn(2, n, TOKENS, size, generator=generator, dtype=torch.float64) for n, size in shapes]
    return [tensor.to(dtype) for tensor in tensors]


def row_batch(segments: str) -> dict[str, torch.Tensor]:
    layout = SEGMENTS[segments]
    batch = {"input_ids": torch.zeros(2, TOKENS, dtype=torch.long)}
    if segments == "packed":
        starts = [[row.index(document) for document in row] for row in layout]
        batch["position_ids"] = torch.arange(TOKENS) - torch.tensor(starts)
    elif layout is not None:
        batch["attention_mask"] = (torch.tensor(layout) >= 0).long()
    return batch


def weights_of(upstream: torch.Tensor, segments: str) -> torch.Tensor:
    """A random gradient for real tokens; what padding returns is nobody's business."""
    layout = SEGMENTS[segments]
    upstream = upstream.transpose(1, 2)
    return upstream if layout is None else upstream * (torch.tensor(layout) >= 0)[..., None, None]


def expected_of(rule, segments, heads, key_value_heads, dtype, value_size, extras):
    query, key, value, upstream = inputs(heads, key_value_heads, dtype, value_size)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = reference_attention(*leaves, **RULES[rule][0], segments=SEGMENTS[segments], **extras)
    weights = weights_of(upstream, segments)
    (output * weights).sum().backward()
    return output.detach() * (weights != 0), *[leaf.grad for leaf in leaves]


def sharded(rule, segments, heads, key_value_heads, dtype, value_size, extras, size, kernel, dropout=0.0):
    mesh = SequenceMesh.build(size)
    query, key, value, upstream = inputs(heads, key_value_heads, dtype, value_size)
    shard = cut_batch(row_batch(segments), size, mesh.sequence_parallel_rank, inner_attention=kernel)["sequence_shard"]
    shard = shard.bind(mesh)
    missing = shard.local_len * size - TOKENS
    start = shard.rank * shard.local_len

    def cut(tensor, dim):
        tensor = torch.nn.functional.pad(tensor.transpose(dim, -1), (0, missing)).transpose(dim, -1)
        return tensor.narrow(dim, start, shard.local_len).contiguous()

    mine = [cut(tensor, 2).requires_grad_() for tensor in (query, key, value)]
    zeros = torch.zeros(2, dtype=torch.long)
    mask = DeferredMask({"mask_function": RULES[rule][1](zeros), "batch_size": 2})
    weights = cut(weights_of(upstream, segments), 1)
    module = torch.nn.Module()
    module.is_causal = True
    output, _ = ulysses_attention(module, *mine, mask, sequence_shard=shard, dropout=dropout, **extras)
    (output * weights).sum().backward()
    return [output.detach() * (weights != 0), *[tensor.grad for tensor in mine]], shard.num_local_tokens


def assemble(results) -> list[torch.Tensor]:
    """Every rank's tokens, in order, without the pad segment."""
    outputs = []
    for index, dim in enumerate((1, 2, 2, 2)):
        outputs.append(torch.cat([tensors[index].narrow(dim, 0, count) for tensors, count in results], dim=dim))
    return outputs


def check(world, arguments, kernel, tolerance):
    expected = expected_of(*arguments)
    actual = assemble(world.run(sharded, *arguments, world.size, kernel))
    for name, ours, theirs in zip(("output", "query", "key", "value"), actual, expected):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("segments", list(SEGMENTS))
@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_on_every_row_shape(worlds, rule, segments, size):
    check(worlds(size), (rule, segments, 6, 2, torch.float64, 8, {}), "sdpa", 1e-12)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("heads", "key_value_heads"), [(6, 2), (9, 3), (5, 1), (4, 4)])
def test_float32_and_other_value_sizes(world2, heads, key_value_heads, kernel):
    check(world2, ("causal", "left", heads, key_value_heads, torch.float32, 5, {}), kernel, 1e-6)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("extras", [{"softcap": 2.0}, {"sinks": 5}, {"scaling": 0.3}])
def test_softcap_sinks_and_scaling(worlds, extras, size):
    sinks = torch.linspace(-1, 2, 5, dtype=torch.float64) if "sinks" in extras else None
    reference_extras = {**extras, "sinks": sinks} if sinks is not None else extras
    expected = expected_of("window", "packed", 5, 1, torch.float64, 8, reference_extras)
    ours = {"s_aux": sinks} if sinks is not None else extras
    arguments = ("window", "packed", 5, 1, torch.float64, 8, ours)
    kernel = "sdpa" if "scaling" in extras else "auto"
    actual = assemble(worlds(size).run(sharded, *arguments, size, kernel))
    for mine, theirs in zip(actual, expected):
        assert (mine - theirs).abs().max() / theirs.abs().max() <= 1e-6


def forward_with_flex(size):
    with torch.no_grad():
        mesh = SequenceMesh.build(size)
        query, key, value, _ = inputs(6, 2, torch.float32, 8)
        shard = cut_batch(row_batch("packed"), size, mesh.sequence_parallel_rank, inner_attention="flex_attention")
        shard = shard["sequence_shard"].bind(mesh)
        pieces = [torch.nn.functional.pad(x, (0, 0, 0, 1)).chunk(size, dim=2)[shard.rank] for x in (query, key, value)]
        mask = DeferredMask({"mask_function": masking_utils.causal_mask_function, "batch_size": 2})
        module = torch.nn.Module()
        return ulysses_attention(module, *pieces, mask, sequence_shard=shard)[0], shard.num_local_tokens


def test_flex_attention_forward(world2):
    """Forward only: torch has no backward of flex attention on a CPU. `tests/gpu` runs both."""
    expected = expected_of("causal", "packed", 6, 2, torch.float32, 8, {})[0]
    outputs = [output[:, :count] for output, count in world2.run(forward_with_flex, 2)]
    assert (torch.cat(outputs, dim=1) - expected).abs().max() <= 1e-5


def with_dropout(size, kernel):
    torch.manual_seed(11)
    return sharded("causal", "packed", 6, 2, torch.float64, 8, {}, size, kernel, dropout=0.3)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_dropout_does_not_depend_on_the_number_of_ranks(worlds, kernel):
    one = assemble([with_dropout(1, kernel)])
    for size in (2, 4):
        several = assemble(worlds(size).run(with_dropout, size, kernel))
        for mine, theirs in zip(several, one):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    plain = expected_of("causal", "packed", 6, 2, torch.float64, 8, {})[0]
    assert (one[0] - plain).abs().max() > 1e-2, "nothing was dropped"


def test_heads_draw_different_dropout():
    torch.manual_seed(0)
    same = torch.ones(1, 4, 16, 8)
    shard = SequenceShard(size=1, rank=0, num_tokens=16, local_len=16)
    values = torch.randn(1, 1, 16, 8).expand(1, 4, 16, 8)
    module = torch.nn.Module()
    output, _ = ulysses_attention(module, same, same, values, None, dropout=0.5, sequence_shard=shard)
    for first in range(4):
        for second in range(first):
            assert (output[:, :, first] - output[:, :, second]).abs().max() > 1e-3


def test_dropout_keeps_the_mean():
    """Averaged over many draws the dropped output is the plain one: 1/sqrt(draws) of noise is left."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    shard = SequenceShard(size=1, rank=0, num_tokens=6, local_len=6)
    module = torch.nn.Module()
    plain, _ = ulysses_attention(module, query, key, value, None, sequence_shard=shard)
    draws = [
        ulysses_attention(module, query, key, value, None, dropout=0.2, sequence_shard=shard)[0] for _ in range(800)
    ]
    assert (torch.stack(draws).mean(0) - plain).abs().max() < 0.1


def test_shard_facts_are_frozen():
    shard = SequenceShard(size=1, rank=0, num_tokens=4, local_len=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        shard.rank = 1

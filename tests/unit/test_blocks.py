"""Rows cut into blocks give what one call with the whole `T x T` mask gives: outputs and every gradient."""

from __future__ import annotations

import random

import pytest
import torch

from hf_longctx.attention import kernels
from hf_longctx.attention.blocks import BlockPlan, plan_blocks, visible
from hf_longctx.attention.call import AttentionCall
from hf_longctx.attention.masks import AttentionRule, KernelPlan, build_mask
from hf_longctx.attention.packed import PACKED
from hf_longctx.parallel.segments import PAD_SEGMENT


CPU = torch.device("cpu")
RULES = {
    "causal": AttentionRule(causal=True),
    "bidirectional": AttentionRule(),
    "causal window": AttentionRule(causal=True, window=5),
    "bidirectional window": AttentionRule(window=4),
    "long causal window": AttentionRule(causal=True, window=150),
    "long bidirectional window": AttentionRule(window=131),
    "window of one": AttentionRule(causal=True, window=1),
}


def segments_of(*rows: tuple[int, ...]) -> torch.Tensor:
    """Rows of segments of these lengths; a negative length is padding."""
    ids = []
    for lengths in rows:
        parts = [torch.full((abs(n),), PAD_SEGMENT if n < 0 else i) for i, n in enumerate(lengths)]
        ids.append(torch.cat(parts))
    return torch.stack(ids).to(torch.int32)


LAYOUTS = {
    "one document": None,
    "ragged": segments_of((9, 1, 13, 300, 77)),
    "equal": segments_of((100, 100, 100, 100)),
    "single tokens": segments_of((1,) * 400),
    "two rows": segments_of((130, 170, 100), (400,)),
    "padding around": segments_of((-30, 200, 140, -30), (129, 128, 127, -16)),
}


def tensors(rows: int, key_heads: int = 2, value_size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 4, 400, 8), (rows, key_heads, 400, 8), (rows, key_heads, 400, value_size)]
    # Laid out as a model's projections are: tokens before heads.
    made = [torch.randn(b, t, n, h, generator=generator, dtype=torch.float64) for b, n, t, h in shapes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def call_of(*inputs: torch.Tensor, **extras) -> AttentionCall:
    return PACKED.call(torch.nn.Identity(), *inputs, None, **extras)


def run(kernel: str, plan: KernelPlan, prepared, inputs, **extras) -> list[torch.Tensor]:
    """Output and gradients under a random upstream gradient that is zero where there is padding."""
    plan = KernelPlan(plan.rule, plan.segments, prepared)
    output = kernels.run_planned(kernel, call_of(*inputs, **extras), plan)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    if plan.segments is not None:
        keep = (plan.segments != PAD_SEGMENT)[..., None, None]
        output, upstream = output * keep, upstream * keep
    return [output, *torch.autograd.grad((output * upstream).sum(), inputs)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_blocks_equal_one_call_with_the_whole_mask(kernel, rule, layout):
    segments, rule = LAYOUTS[layout], RULES[rule]
    rows = 1 if segments is None else len(segments)
    plan, inputs = KernelPlan(rule, segments), tensors(rows, value_size=6 if kernel == "sdpa" else 8)
    whole = build_mask(plan, kernel, rows, 400, torch.float64, CPU)
    if kernel == "eager":
        whole = whole.clamp(min=-1e300)  # transformers' own sum with the lowest number overflows
    prepared = kernels.plan_for_kernel(plan, kernel, call_of(*inputs))
    if kernel == "sdpa" and not plan.is_plain:
        assert isinstance(prepared, BlockPlan)
    for actual, expected in zip(run(kernel, plan, prepared, inputs), run(kernel, plan, whole, inputs)):
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", ["causal", "causal window", "bidirectional window"])
def test_eager_blocks_know_sinks_and_softcap(rule):
    plan, inputs = KernelPlan(RULES[rule], LAYOUTS["ragged"]), tensors(1)
    extras = {"softcap": 3.0, "s_aux": torch.randn(4, dtype=torch.float64)}
    whole = build_mask(plan, "eager", 1, 400, torch.float64, CPU).clamp(min=-1e300)
    prepared = kernels.plan_for_kernel(plan, "eager", call_of(*inputs))
    assert isinstance(prepared, BlockPlan)
    for actual, expected in zip(
        run("eager", plan, prepared, inputs, **extras), run("eager", plan, whole, inputs, **extras)
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def plan_of(rule: AttentionRule, segments: torch.Tensor) -> BlockPlan:
    return plan_blocks(rule, segments, *segments.shape, lambda *_: None)


def test_documents_of_equal_length_share_one_call():
    plan = plan_of(AttentionRule(causal=True), segments_of((50,) * 64))
    assert len(plan.calls) == 1 and len(plan.calls[0].queries) == 64
    plan = plan_of(AttentionRule(causal=True), segments_of((7, 9, 7, 9, 7), (9, 9, 7, 7, 7)))
    assert sorted(len(call.queries) for call in plan.calls) == [4, 6]


def test_a_window_reads_its_neighbours_only():
    plan = plan_of(AttentionRule(causal=True, window=200), segments_of((1000,)))
    assert plan.lengths == (200,) * 5
    assert {call.keys for call in plan.calls} == {((0, 1),), ((0, 2), (1, 3), (2, 4), (3, 5))}
    plan = plan_of(AttentionRule(window=200), segments_of((1000,)))
    assert {pair for call in plan.calls for pair in call.keys} == {(0, 2), (0, 3), (1, 4), (2, 5), (3, 5)}


def test_random_layouts_are_covered_once():
    draw = random.Random(0)
    for _ in range(50):
        lengths, total = [], 0
        while total < 600:
            length = min(draw.choice([1, 2, 7, 128, 129, 200]), 600 - total)
            lengths.append(draw.choice([1, 1, -1]) * length)
            total += length
        merged = [lengths[0]]  # padding next to padding is one stretch
        for length in lengths[1:]:
            if length < 0 and merged[-1] < 0:
                merged[-1] += length
            else:
                merged.append(length)
        segments, rule = segments_of(tuple(merged)), draw.choice(list(RULES.values()))
        plan = plan_of(rule, segments)
        covered = torch.zeros(600, dtype=torch.int)
        starts = [0, *torch.tensor(plan.lengths).cumsum(0).tolist()]
        for call in plan.calls:
            for query, (low, high) in zip(call.queries, call.keys):
                covered[starts[query] : starts[query + 1]] += 1
                assert len(segments[0, starts[low] : starts[high]].unique()) == 1, "keys of another document"
        assert torch.equal(covered, (segments[0] != PAD_SEGMENT).int())


def test_interrupted_document_keeps_the_mask():
    segments = torch.tensor([[0, 0, PAD_SEGMENT, 0]], dtype=torch.int32)
    assert plan_of(AttentionRule(causal=True), segments) is None
    call = call_of(*[torch.zeros(1, 2, 4, 8)] * 3)
    plan = kernels.plan_for_kernel(KernelPlan(AttentionRule(causal=True), segments), "sdpa", call)
    assert plan.shape == (1, 1, 4, 4)


def test_same_segment_number_in_two_rows_is_not_an_interruption():
    segments = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.int32)
    assert plan_of(AttentionRule(), segments).lengths == (2, 2, 3, 1)


def test_eager_lets_padded_queries_see_what_the_host_does():
    call = call_of(*[torch.zeros(1, 2, 400, 8)] * 3)
    plan = KernelPlan(AttentionRule(causal=True), segments_of((-30, 370)))
    assert kernels.plan_for_kernel(plan, "eager", call).shape == (1, 1, 400, 400)


@pytest.mark.parametrize("offset", [0, 3])
def test_visible_says_what_a_loop_says(offset):
    for rule in RULES.values():
        seen = visible(rule, 4, 9, offset, CPU)
        for query in range(4):
            for key in range(9):
                distance = offset + query - key
                wanted = distance >= 0 if rule.causal else True
                if rule.window is not None:
                    wanted = wanted and (distance < rule.window if rule.causal else abs(distance) <= rule.window)
                assert wanted == (True if seen is None else bool(seen[query, key]))

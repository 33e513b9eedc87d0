"""Rules of who sees whom: read from transformers, applied to whole rows, compared with plain loops over query and
key."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, Llama4TextConfig, LlamaConfig, MistralConfig, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3 import modeling_gemma3

from hf_longctx.attention import kernels
from hf_longctx.attention.blocks import BlockPlan
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.attention.deferred import DeferredMask, deferred_mask
from hf_longctx.attention.masks import (
    AttentionRule,
    KernelPlan,
    build_mask,
    chunk_segments,
    index_function,
    plan_row,
    read_rule,
    segment_bounds,
)
from hf_longctx.attention.packed import PACKED
from hf_longctx.attention.padding_masks import without_padding_mask
from hf_longctx.attention.ulysses import ulysses_attention
from hf_longctx.parallel.segments import PAD_SEGMENT
from hf_longctx.parallel.shard import SequenceShard, cut_batch


CPU = torch.device("cpu")
NO_PADDING = torch.zeros(2, dtype=torch.long)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])


# Reading transformers' functions

CAUSAL = masking_utils.causal_mask_function
READABLE = {
    "causal": (CAUSAL, AttentionRule(causal=True)),
    "bidirectional": (masking_utils.bidirectional_mask_function, AttentionRule()),
    "sliding": (masking_utils.sliding_window_causal_mask_function(5), AttentionRule(causal=True, window=5)),
    "bidirectional sliding": (masking_utils.sliding_window_bidirectional_mask_function(5), AttentionRule(window=5)),
    "chunked": (
        masking_utils.chunked_causal_mask_function(6, NO_PADDING),
        AttentionRule(causal=True, chunk=6),
    ),
    "two windows": (
        masking_utils.and_masks(
            masking_utils.sliding_window_causal_mask_function(5), masking_utils.sliding_window_overlay(3)
        ),
        AttentionRule(causal=True, window=3),
    ),
    "padded": (
        masking_utils.and_masks(CAUSAL, masking_utils.padding_mask_function(torch.ones(2, 6, dtype=torch.bool))),
        AttentionRule(causal=True),
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", READABLE)
def test_rule_is_read_from_the_hosts_function(case, packed):
    function, rule = READABLE[case]
    if packed and hasattr(masking_utils, "packed_sequence_compatibility_function"):
        function = masking_utils.packed_sequence_compatibility_function(function, POSITIONS, POSITIONS)
    elif packed:  # what an older transformers does
        function = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(POSITIONS))
    assert read_rule(function) == rule


def test_function_of_a_model_is_refused_by_name():
    def my_own_rule(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx <= q_idx

    for function in (my_own_rule, masking_utils.and_masks(CAUSAL, my_own_rule)):
        with pytest.raises(NotImplementedError) as error:
            read_rule(function)
        assert f"{__name__}.test_function_of_a_model" in str(error.value) and "my_own_rule" in str(error.value)
        assert "set `sequence_parallel_size` to 1" in str(error.value)


def test_function_that_looks_like_the_hosts_is_not_trusted():
    def causal_mask_function(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < q_idx

    with pytest.raises(NotImplementedError, match="causal_mask_function"):
        read_rule(causal_mask_function)


def test_union_and_block_rules_of_the_host_are_refused_by_name():
    blocks = masking_utils.blockwise_overlay(POSITIONS)
    with pytest.raises(NotImplementedError, match="or_masks"):
        read_rule(masking_utils.or_masks(CAUSAL, CAUSAL))
    with pytest.raises(NotImplementedError, match="blockwise_overlay"):
        read_rule(masking_utils.and_masks(CAUSAL, blocks))


GEMMA = modeling_gemma3._bidirectional_window_overlay
OPENED = {
    "within the window": (masking_utils.sliding_window_causal_mask_function(4), GEMMA(4), AttentionRule(window=3)),
    "a shorter window behind": (
        masking_utils.sliding_window_causal_mask_function(2),
        GEMMA(4),
        AttentionRule(window=3),
    ),
}


@pytest.mark.parametrize("case", OPENED)
def test_a_causal_rule_that_gemma_opens_ahead_is_read(case):
    behind, ahead, rule = OPENED[case]
    union = masking_utils.or_masks(behind, ahead)
    assert read_rule(union) == rule
    with pytest.raises(NotImplementedError, match="or_masks"):
        read_rule(masking_utils.or_masks(ahead, behind))
    seen = [[bool(union(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(9)] for q in range(9)]
    assert seen == [[abs(q - k) <= rule.window for k in range(9)] for q in range(9)]


def test_a_union_that_is_no_single_rule_is_refused():
    for behind in (CAUSAL, masking_utils.sliding_window_causal_mask_function(5), GEMMA(4)):
        with pytest.raises(NotImplementedError):
            read_rule(masking_utils.or_masks(behind, GEMMA(4)))


def test_function_without_a_name_is_refused_too():
    with pytest.raises(NotImplementedError, match="sequence_parallel_size"):
        read_rule(functools.partial(CAUSAL))


def test_two_chunk_lengths_are_refused():
    chunks = [masking_utils.chunked_overlay(length, NO_PADDING) for length in (4, 6)]
    assert read_rule(masking_utils.and_masks(chunks[0], chunks[0])) == AttentionRule(chunk=4)
    with pytest.raises(NotImplementedError, match=r"chunks of \[4, 6\]"):
        read_rule(masking_utils.and_masks(*chunks))


MIXED_WINDOWS = {
    "causal, window both ways": (
        masking_utils.and_masks(CAUSAL, masking_utils.sliding_window_bidirectional_overlay(3)),
        AttentionRule(causal=True, window=4),
    ),
    "both windows, two-sided shorter": (
        masking_utils.and_masks(
            masking_utils.sliding_window_causal_mask_function(5), masking_utils.sliding_window_bidirectional_overlay(2)
        ),
        AttentionRule(causal=True, window=3),
    ),
    "both windows, one-sided shorter": (
        masking_utils.and_masks(
            masking_utils.sliding_window_causal_mask_function(2), masking_utils.sliding_window_bidirectional_overlay(2)
        ),
        AttentionRule(causal=True, window=2),
    ),
    "two windows both ways": (
        masking_utils.and_masks(
            masking_utils.sliding_window_bidirectional_mask_function(4),
            masking_utils.sliding_window_bidirectional_overlay(2),
        ),
        AttentionRule(window=2),
    ),
}


@pytest.mark.parametrize("case", MIXED_WINDOWS)
def test_mixed_kinds_of_window_are_exact(case):
    """Transformers' one-sided window counts the query, its two-sided window does not."""
    function, expected = MIXED_WINDOWS[case]
    rule = read_rule(function)
    assert rule == expected
    assert torch.equal(visible(index_function(KernelPlan(rule)), 1, 9), visible(function, 1, 9))


@pytest.mark.parametrize("also", [[], [masking_utils.sliding_window_bidirectional_overlay(2)]])
def test_window_backwards_without_a_causal_rule_is_refused(also):
    behind = [masking_utils.bidirectional_mask_function, masking_utils.sliding_window_overlay(3), *also]
    with pytest.raises(NotImplementedError, match="looks 3 tokens back but also ahead"):
        read_rule(masking_utils.and_masks(*behind))


# Rules on rows, against loops


def visible(function, rows: int, tokens: int) -> torch.Tensor:
    """An index function on every `(row, query, key)`."""
    row = torch.arange(rows)[:, None, None]
    index = torch.arange(tokens)
    return function(row, torch.tensor(0), index[None, :, None], index[None, None, :]).expand(rows, tokens, tokens)


def documents_of(layout: list[tuple[bool, int]]) -> tuple[list[int], list[int]]:
    """The document (-1 for padding) and the position in it of every token of one row."""
    document, position = [], []
    for number, (is_padding, length) in enumerate(layout):
        document += [-1 if is_padding else number] * length
        position += range(length)
    return document, position


def sees(rule: AttentionRule, document: list[int], position: list[int], query: int, key: int) -> bool:
    """The slow, obvious definition, in positions of the document."""
    if document[query] == -1 or document[query] != document[key]:
        return False
    distance = position[query] - position[key]
    if rule.causal and distance < 0:
        return False
    if rule.window is not None:
        reach = rule.window - 1 if rule.causal else rule.window
        if abs(distance) > reach:
            return False
    return rule.chunk is None or position[query] // rule.chunk == position[key] // rule.chunk


def random_layout(draw: random.Random, kind: str, tokens: int) -> list[tuple[bool, int]]:
    if kind == "full":
        return [(False, tokens)]
    if kind == "packed":
        cuts = sorted(draw.sample(range(1, tokens), 3))
        return [(False, stop - start) for start, stop in zip([0, *cuts], [*cuts, tokens])]
    length = draw.randint(1, tokens - 1)
    if kind == "both":
        left = draw.randint(0, tokens - length)
        return [(True, left), (False, length), (True, tokens - length - left)]
    row = [(False, length), (True, tokens - length)]
    return row if kind == "right" else row[::-1]


def batch_of(layouts: list[list[tuple[bool, int]]]) -> dict[str, torch.Tensor]:
    rows = [documents_of(layout) for layout in layouts]
    batch = {"input_ids": torch.ones(len(rows), len(rows[0][0]), dtype=torch.long)}
    if any(document == -1 for documents, _ in rows for document in documents):
        batch["attention_mask"] = torch.tensor([[int(d != -1) for d in documents] for documents, _ in rows])
    else:
        batch["position_ids"] = torch.tensor([positions for _, positions in rows])
    return batch


RULES = [
    AttentionRule(causal, window, chunk)
    for causal, window, chunk in itertools.product((True, False), (None, 1, 3, 40), (None, 1, 4, 40))
]


@pytest.mark.parametrize("kind", ["full", "right", "left", "both", "packed"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_rule_on_a_row_equals_plain_loops(kind, size):
    draw, tokens = random.Random(f"{kind}{size}"), 13
    for rule in RULES:
        layouts = [random_layout(draw, kind, tokens) for _ in range(2)]
        shard = cut_batch(batch_of(layouts), size, 0)["sequence_shard"]
        plan = plan_row(rule, shard, 2, CPU)
        seen = visible(index_function(plan), 2, tokens)
        assert plan.rule.chunk is None
        only_right = kind != "packed" and not any(documents_of(layout)[0][0] == -1 for layout in layouts)
        for row, layout in enumerate(layouts):
            document, position = documents_of(layout)
            for query in range(tokens):
                if document[query] == -1 and rule.causal and only_right:
                    continue  # nothing is computed from what padding on the right sees
                expected = [sees(rule, document, position, query, key) for key in range(tokens)]
                assert seen[row, query].tolist() == expected, (rule, layouts, row, query)


def test_what_cannot_matter_needs_no_mask():
    full = cut_batch({"input_ids": torch.ones(2, 8, dtype=torch.long)}, 2, 0)["sequence_shard"]
    right = cut_batch(batch_of([[(False, 5), (True, 2)], [(False, 7)]]), 2, 0)["sequence_shard"]
    left = cut_batch(batch_of([[(True, 2), (False, 5)], [(False, 7)]]), 2, 0)["sequence_shard"]
    causal, wide = AttentionRule(causal=True), AttentionRule(causal=True, window=8, chunk=8)
    for shard, rule in itertools.product((full, right), (causal, wide)):  # rows of 8 and of 7 tokens
        assert plan_row(rule, shard, 2, CPU).is_plain
    assert plan_row(AttentionRule(), full, 2, CPU).is_plain
    for shard, rule in ((left, causal), (right, AttentionRule()), (full, AttentionRule(causal=True, window=7))):
        assert not plan_row(rule, shard, 2, CPU).is_plain


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_built_mask_equals_plain_loops(kernel):
    layouts = [[(True, 2), (False, 5)], [(False, 7)]]
    rule = AttentionRule(causal=True, window=3)
    plan = plan_row(rule, cut_batch(batch_of(layouts), 2, 0)["sequence_shard"], 2, CPU)
    mask = build_mask(plan, kernel, 2, 7, torch.float32, CPU)
    assert mask.shape == (2, 1, 7, 7)
    for row, layout in enumerate(layouts):
        document, position = documents_of(layout)
        expected = [[sees(rule, document, position, query, key) for key in range(7)] for query in range(7)]
        if kernel == "sdpa":
            assert mask[row, 0].tolist() == expected
        else:
            assert (mask[row, 0] == 0).tolist() == expected


def test_sdpa_takes_no_mask_for_a_plain_plan_and_flash_never_takes_one(monkeypatch):
    monkeypatch.setattr(kernels, "_flash_supports", lambda kernel, *names: kernel != "org/plain")
    call = PACKED.call(torch.nn.Identity(), *[torch.zeros(2, 3, 8, 4)] * 3, None)
    plain = KernelPlan(AttentionRule(causal=True))
    window = KernelPlan(AttentionRule(causal=True, window=3))
    assert kernels.plan_for_kernel(plain, "sdpa", call) is None
    assert isinstance(kernels.plan_for_kernel(window, "sdpa", call), BlockPlan)
    assert kernels.plan_for_kernel(window, "flash_attention_2", call) is None
    with pytest.raises(NotImplementedError, match="sliding window of 3 tokens.*'org/plain'.*sdpa"):
        kernels.plan_for_kernel(window, "org/plain", call)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [-1, -1, 0, 0, 0, 0, 0, 0]])
    bounds = kernels.plan_for_kernel(KernelPlan(plain.rule, segments), "org/kernel", call)
    assert bounds["cu_seq_lens_q"].tolist() == bounds["cu_seq_lens_k"].tolist() == [0, 3, 7, 8, 10, 16]
    assert bounds["max_length_q"] == bounds["max_length_k"] == 6


# Chunks and bounds


def test_chunks_are_counted_from_the_start_of_each_document():
    assert chunk_segments(None, 3, 2, 7, CPU).tolist() == [[0, 0, 0, 1, 1, 1, 2]] * 2
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1], [-1, -1, 0, 0, 0, 0, 0, 0]])
    chunks = chunk_segments(segments, 2, 2, 8, CPU)
    assert chunks.dtype == torch.int32
    parts = [[list(group) for _, group in itertools.groupby(row)] for row in chunks.tolist()]
    assert [[len(part) for part in row] for row in parts] == [[2, 2, 2, 1, 1], [2, 2, 2, 2]]
    assert all(len({part[0] for part in row}) == len(row) for row in parts)
    assert (chunks == -1).tolist() == (segments == -1).tolist()


def test_chunks_of_different_documents_never_share_a_number():
    """Every way to lay documents out in six tokens, with padding before, between and behind them."""
    for cuts in itertools.product((False, True), repeat=5):
        numbers = [0, *itertools.accumulate(map(int, cuts))]
        # A document of padding is one stretch, and what follows it goes on counting, as after a mask with holes.
        for padding in (None, *range(numbers[-1] + 1)):
            segments = torch.tensor([[PAD_SEGMENT if number == padding else number for number in numbers]])
            for chunk in range(1, 7):
                chunks = chunk_segments(segments, chunk, 1, 6, CPU)[0].tolist()
                position = [index - numbers.index(number) for index, number in enumerate(numbers)]
                expected = [(number, at // chunk) for number, at in zip(numbers, position)]
                assert [number == PAD_SEGMENT for number in chunks] == [number == padding for number in numbers]
                for one, other in itertools.combinations(range(6), 2):
                    if padding not in (numbers[one], numbers[other]):
                        same = chunks[one] == chunks[other]
                        assert same == (expected[one] == expected[other]), (numbers, padding, chunk)


def test_chunks_of_a_mask_with_holes_are_those_of_the_host():
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1]])
    rule = AttentionRule(causal=True, chunk=4)
    stock = masking_utils.and_masks(
        masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
        masking_utils.padding_mask_function(mask.bool()),
    )
    shard = cut_batch({"input_ids": torch.ones_like(mask), "attention_mask": mask}, 1, 0)["sequence_shard"]
    plan = plan_row(rule, shard, 1, CPU)
    real = mask[0].bool()
    assert torch.equal(visible(index_function(plan), 1, 9)[0, real], visible(stock, 1, 9)[0, real])


def test_bounds_of_whole_rows_are_the_rows():
    bounds, longest = segment_bounds(None, 3, 5, CPU)
    assert bounds.tolist() == [0, 5, 10, 15] and bounds.dtype == torch.int32 and longest == 5


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]], [0, 2, 5, 6, 7, 10]),
        ([[0, 0, 0, 0, -1], [0, 0, 0, 0, 0]], [0, 4, 5, 10]),
        ([[-1, -1, 0, 0, 0], [0, 0, 0, 0, -1]], [0, 2, 5, 9, 10]),
        ([[-1, 0, 0, 0, -1], [0, 0, 1, -1, -1]], [0, 1, 4, 5, 7, 8, 10]),
        ([[-1, -1, -1, -1, -1], [0, 0, 0, 0, 0]], [0, 5, 10]),
    ],
    ids=["packed", "right", "left", "both sides", "empty row"],
)
def test_bounds_of_segments_are_flat_and_never_cross_a_row(segments, expected):
    bounds, longest = segment_bounds(torch.tensor(segments), 2, 5, CPU)
    assert bounds.tolist() == expected and bounds.dtype == torch.int32
    assert longest == max(stop - start for start, stop in zip(expected, expected[1:]))


HOLES = {
    "two holes": [[0, -1, 0, -1, 0]],
    "hole and left padding": [[-1, 0, -1, 0, 0]],
    "one hole": [[0, 0, -1, 0, 0]],
    "hole behind whole rows": [[0, 0, 0, 0, 0], [0, 0, -1, 0, 0]],
}


@pytest.mark.parametrize("case", list(HOLES))
def test_hole_in_a_document_is_refused_for_flash(case):
    segments = torch.tensor(HOLES[case])
    with pytest.raises(NotImplementedError, match="holes inside a document.*`inner_attention='sdpa'`"):
        segment_bounds(segments, *segments.shape, CPU)


# The mask that waits

MASKS = {
    "none": {},
    "all ones": {"attention_mask": torch.ones(2, 6, dtype=torch.long)},
    "right": {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])},
    "left": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])},
    "packed": {"position_ids": POSITIONS},
}
MAKERS = {
    "causal": (masking_utils.create_causal_mask, LlamaConfig(), AttentionRule(causal=True)),
    "sliding": (
        masking_utils.create_sliding_window_causal_mask,
        MistralConfig(sliding_window=3),
        AttentionRule(causal=True, window=3),
    ),
    "chunked": (
        masking_utils.create_chunked_causal_mask,
        Llama4TextConfig(attention_chunk_size=3),
        AttentionRule(causal=True, chunk=3),
    ),
    "bidirectional": (masking_utils.create_bidirectional_mask, LlamaConfig(), AttentionRule()),
    "bidirectional sliding": (
        masking_utils.create_bidirectional_sliding_window_mask,
        Gemma2Config(sliding_window=2),
        AttentionRule(window=2),
    ),
}


def mask_of(maker: str, rows: str, attention: str):
    """What transformers prepares for a model on `attention`."""
    make, config, _ = MAKERS[maker]
    config._attn_implementation = attention
    inputs = {"attention_mask": None, OUTPUT_NAME: None, **MASKS[rows]}
    if not maker.startswith("bidirectional"):
        inputs.setdefault("position_ids", None)
    return make(config=config, inputs_embeds=torch.zeros(2, 6, 4), **inputs)


MADE = [(maker, rows) for maker in MAKERS for rows in MASKS if not (maker.startswith("bi") and rows == "packed")]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("maker", "rows"), MADE)
def test_deferred_mask_builds_exactly_the_kernels_own(maker, rows, kernel):
    deferred, expected = mask_of(maker, rows, "ulysses"), mask_of(maker, rows, kernel)
    assert isinstance(deferred, DeferredMask)
    assert deferred.rule() == MAKERS[maker][2]
    built = deferred.build(kernel)
    if expected is None:
        assert built is None
    else:
        assert built.dtype == expected.dtype and torch.equal(built, expected)
    assert deferred.build(kernel) is built  # once per forward, not once per layer


def test_deferred_masks_are_sometimes_none_and_sometimes_not():
    built = [mask_of(maker, rows, "ulysses").build("sdpa") is None for maker, rows in MADE]
    assert any(built) and not all(built)


def test_name_stands_for_our_attention_and_our_mask():
    assert ALL_ATTENTION_FUNCTIONS["ulysses"] is ulysses_attention
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["ulysses"] is deferred_mask


def test_prepared_deferred_mask_is_kept():
    prepared = mask_of("causal", "left", "ulysses")
    arguments = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": CAUSAL}
    assert deferred_mask(**arguments, attention_mask=prepared) is prepared
    assert deferred_mask(**arguments, attention_mask=None) is not prepared


def test_deferred_mask_looks_4d_moves_and_stays_itself():
    mask = mask_of("causal", "left", "ulysses")
    assert mask.shape == (2, 1, 6, 6) and mask.ndim == 4 and mask.contiguous() is mask
    moved = mask.to("cpu")
    assert moved is not mask and torch.equal(moved.build("sdpa"), mask.build("sdpa"))
    assert moved.rule() == mask.rule()


@pytest.mark.parametrize("name", ["clone", "expand", "dim", "masked_fill"])
def test_model_that_edits_its_mask_is_refused(name):
    mask = mask_of("causal", "left", "ulysses")
    with pytest.raises(NotImplementedError) as error:
        getattr(mask, name)
    assert f"edits its attention mask itself (`.{name}`)" in str(error.value)
    assert "use 'sdpa' or 'eager'" in str(error.value)


def test_model_that_hands_its_mask_to_torch_is_refused():
    mask = mask_of("causal", "left", "ulysses")
    with pytest.raises(NotImplementedError, match="edits its attention mask itself .`masked_fill`."):
        torch.zeros(2, 1, 6, 6).masked_fill(mask, 0.0)


# Kernels: which one, and what it cannot do


def call_on(query, dropout: float = 0.0, **extras):
    return PACKED.call(None, query, None, None, None, dropout, **extras)


def fake_query(device: str = "cpu", dtype: torch.dtype = torch.float32, head_size: int = 64):
    return SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype, shape=(1, 2, 8, head_size))


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention", "flash_attention_3", "org/name"])
def test_named_kernel_is_kept(name):
    assert kernels.choose_kernel(name, call_on(fake_query("cuda", torch.bfloat16), softcap=30.0)) == name


@pytest.mark.parametrize(
    ("query", "extras", "expected"),
    [
        (fake_query(), {}, "sdpa"),
        (fake_query(), {"s_aux": None, "softcap": None, "sliding_window": 4}, "sdpa"),
        (fake_query(), {"softcap": 30.0}, "eager"),
        (fake_query(), {"s_aux": torch.zeros(2)}, "eager"),
        (fake_query("cuda"), {"softcap": 30.0}, "flex_attention"),
        (fake_query("cuda", torch.bfloat16), {}, "flash_attention_2"),
        (fake_query("cuda", torch.float16), {}, "flash_attention_2"),
        (fake_query("cuda", torch.float32), {}, "sdpa"),
        (fake_query("cuda", torch.bfloat16, 512), {}, "sdpa"),
        (fake_query("cpu", torch.bfloat16), {}, "sdpa"),
        (fake_query(), {"alibi_slopes": torch.zeros(2)}, "sdpa"),
        (fake_query("cuda", torch.bfloat16), {"alibi_slopes": torch.zeros(2)}, "flex_attention"),
        (fake_query("cuda", torch.float64), {"alibi_slopes": torch.zeros(2)}, "sdpa"),
        (fake_query("cuda", torch.bfloat16, 8), {"alibi_slopes": torch.zeros(2)}, "sdpa"),
        (fake_query("cuda"), {"alibi_slopes": torch.zeros(2), "softcap": 30.0}, "eager"),
        (fake_query("cuda"), {"alibi_slopes": torch.zeros(2), "dropout": 0.1}, "sdpa"),
        (fake_query("cuda"), {"distance_bias": torch.zeros(2, 15)}, "sdpa"),
    ],
)
def test_auto_takes_the_kernel_that_can(monkeypatch, query, extras, expected):
    monkeypatch.setattr(kernels, "is_flash_attn_2_available", lambda: True)
    assert kernels.choose_kernel("auto", call_on(query, **extras)) == expected


def test_auto_takes_sdpa_without_flash(monkeypatch):
    monkeypatch.setattr(kernels, "is_flash_attn_2_available", lambda: False)
    assert kernels.choose_kernel("auto", call_on(fake_query("cuda", torch.bfloat16))) == "sdpa"


SINKS = {"s_aux": torch.zeros(2)}


@pytest.mark.parametrize(
    ("kernel", "extras", "dropout", "message"),
    [
        ("sdpa", SINKS, 0.0, r"sinks \(`s_aux`\), which the 'sdpa' kernel does not have.*'eager' or 'flex_attention'"),
        ("flash_attention_2", SINKS, 0.0, "which the 'flash_attention_2' kernel does not have"),
        ("sdpa", {"softcap": 30.0}, 0.0, r"\(`softcap`\), which the 'sdpa' kernel does not do.*'eager'"),
        ("flex_attention", {}, 0.1, r"attention dropout \(0.1\) is not done by 'flex_attention'.*'eager'"),
    ],
)
def test_what_a_kernel_would_ignore_is_refused_by_name(monkeypatch, kernel, extras, dropout, message):
    monkeypatch.setattr(kernels, "_flash_supports", lambda kernel, *names: False)
    with pytest.raises(NotImplementedError, match=message):
        kernels.refuse_unsupported(kernel, call_on(None, dropout, **extras))


@pytest.mark.parametrize("kernel", ["eager", "flex_attention", "org/with-sinks"])
def test_what_a_kernel_can_do_is_not_refused(monkeypatch, kernel):
    monkeypatch.setattr(kernels, "_flash_supports", lambda kernel, *names: kernel == "org/with-sinks")
    kernels.refuse_unsupported(kernel, call_on(None, **SINKS, softcap=30.0))
    kernels.refuse_unsupported("sdpa", call_on(None, 0.1, s_aux=None, softcap=None))
    kernels.refuse_unsupported("eager", call_on(None, 0.1))


@pytest.fixture
def installed(monkeypatch):
    """A function that makes exactly the named packages look installed."""

    def install(*names: str) -> None:
        def find_spec(name: str):
            if "." in name and name.split(".")[0] not in names:
                raise ModuleNotFoundError(name)
            return object() if name in names else None

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return install


@pytest.mark.parametrize(
    ("kernel", "package"),
    [
        ("flash_attention_2", "`flash-attn` or `kernels`"),
        ("flash_attention_3", "`flash-attn-3` or `kernels`"),
        ("flash_attention_4", "`flash-attn-4` or `kernels`"),
        ("org/name", "`kernels`"),
    ],
)
def test_missing_package_is_named(installed, kernel, package):
    installed()
    with pytest.raises(ImportError) as error:
        kernels.validate_kernel_available(kernel)
    assert f"`inner_attention` ('{kernel}') needs the package {package}, which is not installed" in str(error.value)
    assert "pip install" in str(error.value) and "'sdpa'" in str(error.value)


def test_installed_package_is_enough(installed):
    installed()
    for kernel in ("auto", "sdpa", "eager", "flex_attention"):
        kernels.validate_kernel_available(kernel)
    installed("flash_attn")
    kernels.validate_kernel_available("flash_attention_2")
    with pytest.raises(ImportError):
        kernels.validate_kernel_available("flash_attention_3")
    installed("kernels")
    for kernel in ("flash_attention_2", "flash_attention_4", "org/name"):
        kernels.validate_kernel_available(kernel)


# Masks that a model made itself, and blocks that a batch has none of


def shard_of(segments, rank: int = 0, tokens: int = 7):
    return SequenceShard(size=2, rank=rank, num_tokens=tokens, local_len=4, segment_ids=segments)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("as_numbers", [True, False])
def test_a_mask_that_repeats_the_padding_is_left_to_the_shard(rank, as_numbers):
    segments = torch.zeros(2, 7, dtype=torch.int32)
    segments[0, :2] = segments[1, 5:] = -1
    whole = torch.nn.functional.pad(segments, (0, 1), value=-1) == -1
    hidden = whole[:, rank * 4 : rank * 4 + 4][:, None, None]
    mask = hidden * torch.finfo(torch.float32).min if as_numbers else ~hidden
    shard = shard_of(segments, rank)
    assert without_padding_mask(mask, None, shard, 2) == (None, False)
    other = mask.roll(1, -1)
    assert without_padding_mask(other, None, shard, 2)[0] is other
    if as_numbers:
        bias = mask + 0.5 * ~hidden
        assert without_padding_mask(bias, None, shard, 2)[0] is bias
        square = mask.expand(2, 1, 4, 4)
        assert without_padding_mask(square, True, shard, 2) == (square, True)


def test_a_row_without_padding_has_only_the_pad_segment_hidden():
    mask = torch.tensor([0.0, 0.0, 0.0, -1e9]).view(1, 1, 1, 4)
    assert without_padding_mask(mask, None, shard_of(None, rank=1), 2) == (None, False)
    assert without_padding_mask(mask, None, shard_of(None, rank=0), 2)[0] is mask


def test_blocks_of_images_are_read_only_if_the_batch_has_none():
    none = masking_utils.blockwise_overlay(torch.full((1, 4), -1))
    some = masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1]]))
    assert read_rule(masking_utils.or_masks(CAUSAL, none)) == AttentionRule(causal=True)
    with pytest.raises(NotImplementedError, match="or_mask"):
        read_rule(masking_utils.or_masks(CAUSAL, some))

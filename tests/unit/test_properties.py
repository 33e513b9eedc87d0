"""Laws that hold for every input, tried on inputs that nobody chose: sharding, packing, attention, heads, and
configuration.

Examples are drawn from a fixed seed, so a run is the same on every machine and never flaky; a failing example is
shrunk to its smallest form. Every law says what it would take to break it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import types
import typing
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from transformers import masking_utils

from hf_longctx import LongContextConfig, MemoryConfig, PackingCollator, SourcesConfig, TextsConfig
from hf_longctx.attention import blocks
from hf_longctx.attention.deferred import DeferredMask
from hf_longctx.attention.masks import AttentionRule, build_mask, plan_row
from hf_longctx.attention.packed import PACKED, attend_rows
from hf_longctx.attention.reference import _sees, reference_attention
from hf_longctx.config.memory import MEMORY_PRESETS
from hf_longctx.config.run import INNER_ATTENTIONS
from hf_longctx.data.packing.datasets import PackedDataset, PackedStream
from hf_longctx.data.packing.lengths import LONG_DOCUMENTS, STRATEGIES, balanced_order, pack_lengths
from hf_longctx.data.packing.samplers import TokenBudgetSampler
from hf_longctx.parallel.heads import split_heads
from hf_longctx.parallel.shard import IGNORE_INDEX, cut_batch


def bounded(examples: int):
    """The same `examples` on every run; no time limit an example, for machines that are slow or paused."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


# Sharding: shard, then concatenate, is the identity


@st.composite
def row_layouts(draw, rows: int, tokens: int):
    """The document of every token of `rows` rows, -1 for padding, and the batch keys that say it to a model.

    One of: nothing, a mask (padding left, right, or with holes), positions that restart, bounds of a flattened row.
    """
    kind = draw(st.sampled_from(["whole", "right", "left", "holes", "positions", "index", "bounds"]))
    if kind == "whole":
        return [[0] * tokens] * rows, {}
    if kind in ("right", "left", "holes"):
        if kind == "holes":
            mask = [draw(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens)) for _ in range(rows)]
        else:
            lengths = [draw(st.integers(1, tokens)) for _ in range(rows)]
            mask = [[1] * n + [0] * (tokens - n) for n in lengths]
            mask = [row[::-1] for row in mask] if kind == "left" else mask
        layout = [[0 if seen else -1 for seen in row] for row in mask]
        return layout, {"attention_mask": torch.tensor(mask)}
    if kind == "bounds" and rows > 1:
        kind = "index"
    starts = [[0, *draw(st.lists(st.integers(1, max(tokens - 1, 1)), max_size=4))] for _ in range(rows)]
    layout = [[sum(start <= i for start in set(row) if 0 < start < tokens) for i in range(tokens)] for row in starts]
    if kind == "index":
        return layout, {"seq_idx": torch.tensor(layout, dtype=torch.int32)}
    if kind == "bounds":
        bounds = [i for i in range(tokens) if i == 0 or layout[0][i] != layout[0][i - 1]] + [tokens]
        return layout, {name: torch.tensor(bounds, dtype=torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    return layout, {"position_ids": torch.tensor([[i - row.index(row[i]) for i in range(tokens)] for row in layout])}


@st.composite
def full_batches(draw):
    """A collated batch of full rows, with every kind of key a collator makes."""
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 33))
    layout, batch = draw(row_layouts(rows, tokens))
    numbers = torch.arange(1, rows * tokens + 1).view(rows, tokens)
    if draw(st.booleans()):
        batch["input_ids"] = numbers
    else:
        batch["inputs_embeds"] = torch.stack([numbers, -numbers], dim=-1).double()
    if draw(st.booleans()):
        batch["labels"] = torch.where(numbers % 3 == 0, IGNORE_INDEX, numbers)
    if draw(st.booleans()):
        batch["token_type_ids"] = (numbers % 2)[:1]  # one row for all
    if draw(st.booleans()):
        batch |= {"scale": torch.tensor(2.0), "note": "kept as it is", "absent": None}
    return layout, batch


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)


@given(full_batches(), st.integers(1, 9), st.booleans())
@bounded(150)
def test_shard_then_concat_is_identity(case, size, shift):
    layout, batch = case
    tokens_key = "input_ids" if "input_ids" in batch else "inputs_embeds"
    rows, tokens = batch[tokens_key].shape[:2]
    shares = [cut_batch(batch, size, rank, shift_labels=shift) for rank in range(size)]

    expected = {key: value for key, value in batch.items() if key not in ("cu_seq_lens_q", "cu_seq_lens_k")}
    expected.pop("seq_idx", None)
    expected.pop("absent", None)
    packs = any(len(set(row) - {-1}) > 1 for row in layout)
    if packs or size > 1:  # whole rows of one process are counted by the model
        counted = [[index - first(row, index) for index in range(tokens)] for row in layout] if packs else None
        expected.setdefault("position_ids", torch.tensor(counted) if packs else torch.arange(tokens)[None])
    if tokens % size:
        expected.setdefault("attention_mask", torch.ones(rows, tokens, dtype=torch.long))
    if shift and "labels" in batch:
        expected["shift_labels"] = shifted(batch["labels"])
    assert all(set(share) == {*expected, "sequence_shard"} for share in shares)
    for key, value in expected.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            assert all(share[key] is value for share in shares)
            continue
        joined = torch.cat([share[key] for share in shares], dim=1)
        assert torch.equal(joined[:, :tokens], value.expand(rows, *value.shape[1:])), key
        fill = IGNORE_INDEX if "labels" in key else 0
        assert joined.dtype == value.dtype and (joined[:, tokens:] == fill).all(), key

    facts = [share["sequence_shard"] for share in shares]
    assert sum(fact.num_local_tokens for fact in facts) == tokens
    assert len({fact.row_hash for fact in facts}) == 1
    for rank, fact in enumerate(facts):
        assert (fact.rank, fact.size, fact.num_tokens) == (rank, size, tokens)
        assert fact.local_len == shares[rank][tokens_key].shape[1] == -(-tokens // size)
        seen = fact.segment_ids
        seen = torch.zeros(rows, tokens, dtype=torch.long) if seen is None else seen
        assert same_documents(seen.tolist(), layout)


def first(row: list[int], index: int) -> int:
    """Where the document of a token begins."""
    while index and row[index - 1] == row[index]:
        index -= 1
    return index


def same_documents(ours: list[list[int]], theirs: list[list[int]]) -> bool:
    """The same tokens share a document and the same are padding, whatever the documents are called."""
    return all(
        (a < 0) == (b < 0) and (i == 0 or (a == mine[i - 1]) == (b == other[i - 1]))
        for mine, other in zip(ours, theirs, strict=True)
        for i, (a, b) in enumerate(zip(mine, other, strict=True))
    )


# Packing: no token is dropped, repeated or moved to another document, and none is cut off that was not to be

# Any lengths; short and long ones; or a few lengths many times, which are placed together.
LENGTHS = st.one_of(
    st.lists(st.one_of(st.integers(1, 12), st.integers(1, 70)), min_size=1, max_size=40),
    st.lists(st.sampled_from([1, 2, 3, 5, 8, 13]), min_size=1, max_size=60),
)
OPTIONS = {
    "strategy": st.sampled_from(STRATEGIES),
    "long_documents": st.sampled_from(LONG_DOCUMENTS),
    "seed": st.one_of(st.none(), st.integers(0, 99)),
}


def kept_tokens(length: int, max_tokens: int, long_documents: str) -> int:
    return min(length, max_tokens) if long_documents == "truncate" else length


def documents_of(lengths: list[int]) -> list[dict]:
    """Tokenized documents in which no two tokens are alike."""
    first = 1
    documents = []
    for length in lengths:
        ids = list(range(first, first + length))
        documents.append({"input_ids": ids, "labels": [-1000 - i for i in ids], "weight": [i / 2 for i in ids]})
        first += length
    return documents


@given(lengths=LENGTHS, max_tokens=st.integers(1, 48), **OPTIONS)
@bounded(200)
def test_packing_puts_every_token_into_one_bin_and_cuts_long_documents_only(
    lengths, max_tokens, strategy, long_documents, seed
):
    options = {"strategy": strategy, "long_documents": long_documents, "seed": seed}
    if long_documents == "error" and max(lengths) > max_tokens:
        with pytest.raises(ValueError, match="over `max_tokens`"):
            pack_lengths(lengths, max_tokens, **options)
        return
    packing = pack_lengths(lengths, max_tokens, **options)
    bins = [packing[i] for i in range(len(packing))]
    assert all(0 < sum(piece.stop - piece.start for piece in pieces) <= max_tokens for pieces in bins)
    pieces = sorted(piece for pieces in bins for piece in pieces)
    for row, length in enumerate(lengths):
        mine = [piece for piece in pieces if piece.row == row]
        assert mine[0].start == 0 and mine[-1].stop == kept_tokens(length, max_tokens, long_documents)
        assert all(a.stop == b.start for a, b in zip(mine, mine[1:]))  # no gap, no overlap
        assert len(mine) == (-(-length // max_tokens) if long_documents == "split" else 1)
    assert len(pieces) == len(packing.rows)
    if strategy == "in_order":
        assert [piece for pieces in bins for piece in pieces] == pieces


@given(lengths=LENGTHS, max_tokens=st.integers(1, 48), multiple=st.sampled_from([None, 1, 8, 13]), **OPTIONS)
@bounded(80)
def test_packed_rows_hold_every_document_as_it_was(lengths, max_tokens, multiple, strategy, long_documents, seed):
    assume(long_documents != "error" or max(lengths) <= max_tokens)
    documents = documents_of(lengths)
    collator = PackingCollator(
        max_tokens=max_tokens, strategy=strategy, long_documents=long_documents, pad_to_multiple_of=multiple
    )
    check_rows(collator, collator.pack(documents, seed=seed), documents, max_tokens, long_documents)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 48), buffer_size=st.integers(1, 50), **OPTIONS)
@bounded(80)
def test_packed_streams_hold_every_document_as_it_was(
    lengths, max_tokens, buffer_size, strategy, long_documents, seed
):
    assume(long_documents != "error" or max(lengths) <= max_tokens)
    documents = documents_of(lengths)
    options = {"strategy": strategy, "long_documents": long_documents, "seed": seed}
    stream = PackedStream(iter(documents), max_tokens, buffer_size=buffer_size, **options)
    rows = check_rows(PackingCollator(max_tokens=max_tokens), stream, documents, max_tokens, long_documents)
    if strategy == "in_order":
        in_memory = PackedDataset(documents, max_tokens, **options)
        assert rows == [[piece["input_ids"] for piece in in_memory[i]] for i in range(len(in_memory))]


def check_rows(collator, rows, documents: list[dict], max_tokens: int, long_documents: str) -> list[list[list[int]]]:
    """Flatten `rows`, cut them where their bounds say, and put the documents together again."""
    found: dict[int, list[int]] = {}
    packed = []
    for row in rows if isinstance(rows, PackedStream) else (rows[i] for i in range(len(rows))):
        batch = collator([row])
        bounds = batch["cu_seq_lens_q"].tolist()
        assert bounds == batch["cu_seq_lens_k"].tolist() and bounds[-1] == batch["input_ids"].shape[1]
        assert batch["max_length_q"] == batch["max_length_k"] == max(b - a for a, b in zip(bounds, bounds[1:]))
        assert bounds[len(row)] <= max_tokens and bounds[-1] % (collator.pad_to_multiple_of or 1) == 0
        packed.append([])
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:])):
            piece = {key: batch[key][0, start:stop].tolist() for key in ("input_ids", "labels", "position_ids")}
            ids = piece["input_ids"]
            assert batch["seq_idx"][0, start:stop].tolist() == [number] * len(ids)
            assert piece["position_ids"] == list(range(len(ids)))
            if number == len(row):  # the document of padding: nothing in it is trained
                assert set(ids) == {0} and set(piece["labels"]) == {IGNORE_INDEX}
                continue
            assert piece["labels"] == [IGNORE_INDEX, *(-1000 - i for i in ids[1:])]
            assert batch["weight"][0, start:stop].tolist() == [i / 2 for i in ids]
            assert found.setdefault(ids[0], ids) is ids, "the same piece twice"
            packed[-1].append(ids)
    together = [token for first in sorted(found) for token in found[first]]
    wanted = (document["input_ids"] for document in documents)
    wanted = [ids[: kept_tokens(len(ids), max_tokens, long_documents)] for ids in wanted]
    assert together == [token for ids in wanted for token in ids]
    if long_documents != "split":
        assert sorted(found.values()) == wanted
    return packed


@given(
    costs=st.lists(st.integers(1, 1000), max_size=60),
    group_size=st.integers(1, 9),
    window=st.integers(1, 40),
    epoch=st.integers(0, 3),
)
@bounded(80)
def test_balanced_order_is_an_order_of_all_rows(costs, group_size, window, epoch):
    order = balanced_order(costs, group_size, seed=1, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(len(costs)))


@given(lengths=LENGTHS, replicas=st.integers(1, 5), shuffle=st.booleans(), epoch=st.integers(0, 2))
@bounded(60)
def test_replicas_together_draw_every_row_and_repeat_only_to_fill_the_last_step(lengths, replicas, shuffle, epoch):
    samplers = [
        TokenBudgetSampler(lengths, 70, num_replicas=replicas, rank=rank, shuffle=shuffle) for rank in range(replicas)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    drawn = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in drawn} == {len(samplers[0])}
    batches = [tuple(batch) for step in zip(*drawn) for batch in step]
    assert sorted(row for batch in set(batches) for row in batch) == list(range(len(lengths)))
    assert len(batches) - len(set(batches)) < replicas


# Attention: every rule on every row equals the reference that loops over queries and keys


@st.composite
def rules(draw, tokens: int) -> tuple[AttentionRule, typing.Callable]:
    """A rule, and transformers' function that says it."""
    causal = draw(st.booleans())
    kind = draw(st.sampled_from(["plain", "window", "chunk", "window", "both"]))
    shorter = st.integers(1, max(tokens - 1, 1)) if draw(st.sampled_from([True, True, False])) else st.just(tokens + 1)
    window = draw(shorter) if kind in ("window", "both") else None
    chunk = draw(shorter) if kind in ("chunk", "both") else None
    parts = [masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function]
    if window is not None:
        overlay = "sliding_window_overlay" if causal else "sliding_window_bidirectional_overlay"
        parts.append(getattr(masking_utils, overlay)(window))
    if chunk is not None:
        parts.append(masking_utils.chunked_overlay(chunk, torch.zeros(2, dtype=torch.long)))
    return AttentionRule(causal, window, chunk), masking_utils.and_masks(*parts)


@st.composite
def attention_cases(draw):
    rows, tokens = draw(st.integers(1, 2)), draw(st.sampled_from([9, 7, 10, 5, 8, 2, 1, 3]))
    layout, batch = draw(row_layouts(rows, tokens))
    batch["input_ids"] = torch.zeros(rows, tokens, dtype=torch.long)
    return layout, batch, *draw(rules(tokens))


def sees_of(layout, rule: AttentionRule) -> torch.Tensor:
    tokens = range(len(layout[0]))
    seen = [
        [[_sees(i, j, row, rule.causal, rule.window, rule.chunk) for j in tokens] for i in tokens] for row in layout
    ]
    return torch.tensor(seen)[:, None]


@given(attention_cases(), st.sampled_from(["sdpa", "eager"]))
@bounded(100)
def test_mask_of_a_row_is_the_rule(case, kernel):
    layout, batch, rule, _ = case
    rows, tokens = batch["input_ids"].shape
    shard = cut_batch(batch, 1, 0)["sequence_shard"]
    plan = plan_row(rule, shard, rows, torch.device("cpu"))
    mask = build_mask(plan, kernel, rows, tokens, torch.float64, torch.device("cpu"))
    seen = mask if mask.dtype == torch.bool else mask == 0
    # Padding sees nothing, since on the left its last token predicts the first real one. Padding on the right of a
    # causal row is not looked at: no real token could see it.
    judged = torch.tensor(layout)[:, None, :, None] >= 0
    if plan.has_padding:
        judged[:] = True
    assert torch.equal(seen.expand(rows, 1, tokens, tokens) & judged, sees_of(layout, rule) & judged)


@given(
    case=attention_cases(),
    kernel=st.sampled_from(["sdpa", "eager"]),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2)]),
    size=st.integers(1, 3),
    shortest_block=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@bounded(60)
def test_attention_of_all_ranks_is_the_reference(case, kernel, heads, size, shortest_block, seed):
    """Each rank's heads of whole rows, as after the exchange; together they are all heads. Output and gradients."""
    layout, batch, rule, function = case
    assume(size <= heads[0])
    assume(any(document >= 0 for row in layout for document in row))  # a batch of padding has no gradient
    rows, tokens = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads[0], tokens, 4), (rows, heads[1], tokens, 4), (rows, heads[1], tokens, 3))
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    upstream = torch.randn(rows, tokens, heads[0], 3, generator=generator, dtype=torch.float64)
    upstream *= (torch.tensor(layout) >= 0)[..., None, None]
    expected = reference_attention(*leaves, causal=rule.causal, window=rule.window, chunk=rule.chunk, segments=layout)

    split, module, parts = split_heads(*heads, size), torch.nn.Module(), []
    with mock.patch.object(blocks, "_SHORTEST_BLOCK", shortest_block):  # so that short rows are cut as well
        for rank in range(size):
            shard = cut_batch(batch, 1, 0, inner_attention=kernel)["sequence_shard"]
            mask = DeferredMask({"mask_function": function, "batch_size": rows})
            call = PACKED.call(module, *leaves, mask).of_heads(slice(*split.query[rank]))
            parts.append(attend_rows(call, shard))
    actual = torch.cat(parts, dim=2)
    gradients = [torch.autograd.grad((out * upstream).sum(), leaves) for out in (actual, expected)]
    real = (upstream != 0).detach()
    outputs = [(out.detach() * real) for out in (actual, expected)]
    for ours, theirs in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1])):
        # Float64 sums of at most ten terms in another order.
        assert (ours - theirs).abs().max() <= 1e-12 * max(1.0, float(theirs.abs().max()))


# Heads: each has one owner, and its key/value head is there


@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 64))
@bounded(200)
def test_head_splits_cover_each_head_once(key_value_heads, group_size, size):
    heads = key_value_heads * group_size
    if size > heads:
        with pytest.raises(ValueError, match="exceeds the model's query heads"):
            split_heads(heads, key_value_heads, size)
        return
    split = split_heads(heads, key_value_heads, size)
    assert [head for start, stop in split.query for head in range(start, stop)] == list(range(heads))
    for rank, (start, stop) in enumerate(split.query):
        first, last = split.key_value[rank]
        wanted = [head // group_size for head in range(start, stop)]
        assert sorted(set(wanted)) == list(range(first, last))  # what it reads, and no more
        index = split.key_value_index(rank)
        if index is None:  # the kernel's own grouping
            per_head = (stop - start) // (last - first)
            index = [i // per_head for i in range(stop - start)]
        assert [first + i for i in index] == wanted


# Configuration: what is written to YAML and read again is the same run

TEXTS = {"inner_attention": (*INNER_ATTENTIONS, "org/name", "org/name@v1"), "memory": MEMORY_PRESETS}
MAPPINGS = {"source_weights": st.floats(2**-20, 2**20), "source_caps": st.integers(1, 2**40)}


@st.composite
def configs(draw):
    """A valid configuration, every field drawn by its type; a text without a list of values keeps its default."""
    kind = draw(st.sampled_from((LongContextConfig, MemoryConfig, SourcesConfig, TextsConfig)))
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        if field.name in TEXTS:
            values[field.name] = draw(st.sampled_from(TEXTS[field.name]))
        elif field.name in MAPPINGS:
            mapping = st.dictionaries(st.text("ab./ ", min_size=1), MAPPINGS[field.name], min_size=1, max_size=3)
            values[field.name] = draw(st.one_of(st.none(), mapping))
        elif float in kinds:
            number = st.floats(2**-20, 1)
            values[field.name] = draw(st.one_of(st.none(), number) if types.NoneType in kinds else number)
        elif bool in kinds:
            values[field.name] = draw(st.booleans())
        elif int in kinds:
            number = st.integers(1, 2**22)
            values[field.name] = draw(st.one_of(st.none(), number) if types.NoneType in kinds else number)
    try:
        return kind(**values)
    except ValueError:  # fields that contradict one another
        reject()


@given(configs())
@bounded(60)
def test_config_survives_yaml_and_the_hosts_parser(config):
    trl = pytest.importorskip("trl")
    text = yaml.safe_dump(dataclasses.asdict(config))
    assert type(config)(**yaml.safe_load(text)) == config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        path.write_text(text)
        (parsed,) = trl.TrlParser((type(config),)).parse_args_and_config(["--config", str(path)])
    assert parsed == config

"""The registry of attention names, and the call that an attention function gets: what is cut, asked and refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import hf_longctx
from hf_longctx.attention import AttentionEntry, attend_sharded, deferred_mask, register_attention, registry
from hf_longctx.parallel.shard import SequenceShard, cut_batch
from hf_longctx.trainer.checks import check_model

from ..models import build


def attention(*_, **__):
    raise AssertionError("never called")


def entry_of(name: str = "other", **changes) -> AttentionEntry:
    return AttentionEntry(**{"name": name, "function": attention, "mask_function": deferred_mask, **changes})


@pytest.fixture
def empty_table(monkeypatch):
    """Names that the test registers are gone after it."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))


# Entries


def test_an_entry_without_a_mask_function_is_refused():
    with pytest.raises(ValueError, match="`mask_function` of the attention 'other' is missing.*deferred_mask"):
        entry_of(mask_function=None)


@pytest.mark.parametrize("name", ["my_flash", "sdpa2", "flex_attention_x", "paged|mine", "org/name"])
def test_names_that_transformers_takes_for_its_own_are_refused(name):
    with pytest.raises(ValueError, match=r"`name` \(.*\) contains '.*', by which transformers takes it for a kernel"):
        entry_of(name)


@pytest.mark.parametrize("name", ["ulysses", "packed", "eager", "other"])
def test_a_name_that_is_taken_is_refused(empty_table, name):
    register_attention(entry_of("other"))
    with pytest.raises(ValueError, match=f"`name` .'{name}'. is an attention name already: .*eager.*ulysses"):
        register_attention(entry_of(name, packs_rows=True))


def test_a_registered_name_is_known_to_both_registries_and_again_changes_nothing(empty_table):
    register_attention(entry_of(shards_rows=True))
    register_attention(entry_of(shards_rows=True))
    assert AttentionInterface._global_mapping["other"] is attention
    assert AttentionMaskInterface._global_mapping["other"] is deferred_mask
    assert registry.shards_rows("other") and not registry.packs_rows("other")


def test_checks_ask_the_entry(empty_table):
    register_attention(entry_of("only packs", packs_rows=True))
    register_attention(entry_of("shards", shards_rows=True))
    two = hf_longctx.LongContextConfig(sequence_parallel_size=2)
    check_model(build("llama", "shards"), two)
    with pytest.raises(ValueError, match="'only packs', which would see only this rank's tokens.*'ulysses'"):
        check_model(build("llama", "only packs"), two)


def comparisons(source: str) -> set[str]:
    """What `source` compares with the name of an attention."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            values = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if {"ulysses", "packed", "planned"} & set(map(str, values)):
                found.add(ast.unparse(node))
    return found


def test_nothing_compares_with_a_name():
    """`kind` is how a proof's rows look."""
    root = Path(hf_longctx.__file__).parent
    found = {text for path in root.rglob("*.py") for text in comparisons(path.read_text())}
    assert {text for text in found if not text.startswith(("kind ", "rows.kind "))} == set()
    assert comparisons("if text._attn_implementation != 'ulysses': pass") and comparisons("x in ('packed', 'y')")


# Calls


def tensors(heads: int = 6, shared: int = 2, tokens: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, tokens, 3, generator=generator) for n in (heads, shared, shared)]


@pytest.mark.parametrize("shared", [1, 2, 3, 6])
def test_cut_heads_read_the_key_value_heads_that_they_read_before(shared):
    query, key, value = tensors(shared=shared)
    slopes, rotations = torch.arange(6.0), torch.randn(6, 3, 2)
    entry = entry_of(per_head=("slopes", "rotations", "s_aux"))
    inputs = {"slopes": slopes, "rotations": rotations, "s_aux": None}
    call = entry.call(None, query, key, value, None, 0.1, 0.5, None, softcap=3.0, **inputs)
    for start in range(6):
        for stop in range(start + 1, 7):
            part = call.of_heads(slice(start, stop))
            assert torch.equal(part.query, query[:, start:stop])
            for ours, theirs in ((part.key, key), (part.value, value)):
                assert (stop - start) % ours.shape[1] == 0
                read = ours.repeat_interleave((stop - start) // ours.shape[1], dim=1)
                assert torch.equal(read, theirs.repeat_interleave(6 // shared, dim=1)[:, start:stop])
            assert torch.equal(part.per_head["slopes"], slopes[start:stop]) and part.per_head["s_aux"] is None
            assert torch.equal(part.per_head["rotations"], rotations[start:stop])
            assert (part.first_head, part.dropout, part.scaling) == (start, 0.1, 0.5)
            assert dict(part.extras) == {"softcap": 3.0}
            again = part.of_heads(slice(stop - start - 1, stop - start))
            assert again.first_head == stop - 1 and torch.equal(again.per_head["slopes"], slopes[stop - 1 : stop])
            assert torch.equal(again.key, key[:, [(stop - 1) * shared // 6]])


def whole_rows(**facts) -> SequenceShard:
    return cut_batch({"input_ids": torch.zeros(2, 4, dtype=torch.int64), **facts}, 1, 0)["sequence_shard"]


def attend(entry: AttentionEntry, shard=None, module=None, dropout: float = 0.0, mask=None, **inputs):
    """An attention that answers with its values, repeated for its query heads."""

    def run(call, shard):
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1).transpose(1, 2)

    call = entry.call(module or torch.nn.Identity(), *tensors(), mask, dropout, **inputs)
    return attend_sharded(call, shard, run)


REFUSED = [
    (lambda: attend(entry_of(), dropout=0.1), "`dropout` .0.1., which attn_implementation='other' does not compute"),
    (lambda: attend(entry_of(), softcap=3.0), "`softcap` .3.0., which attn_implementation='other' does not compute"),
    (lambda: attend(entry_of(), slopes=torch.zeros(6)), "passes `slopes` to its attention, which cannot be split"),
    (
        lambda: attend(entry_of(), mask=torch.zeros(1, 1, 4, 4)),
        "to 4 tokens with a mask of Tensor that the model made itself, but attn_implementation='other' computes",
    ),
    (
        lambda: attend(entry_of(), whole_rows(position_ids=torch.tensor([[0, 1, 0, 1]] * 2))),
        "several documents, which attn_implementation='other' does not keep apart.*'packed'",
    ),
]


@pytest.mark.parametrize(("run", "message"), REFUSED)
def test_what_a_function_would_ignore_is_refused(run, message):
    with pytest.raises(NotImplementedError, match=message):
        run()


@pytest.mark.parametrize("slopes", [torch.zeros(4), torch.tensor(1.0), torch.zeros(1, 6)])
def test_a_per_head_input_of_another_length_is_refused(slopes):
    with pytest.raises(ValueError, match="`slopes` has shape .*cuts it by heads: its first dimension must be the 6"):
        attend(entry_of(per_head=("slopes",)), slopes=slopes)


def test_a_share_is_refused_by_a_name_that_does_not_shard():
    shard = SequenceShard(size=2, rank=0, num_tokens=8, local_len=4)
    with pytest.raises(ValueError, match="attn_implementation='other', which works on whole rows.*'ulysses'"):
        attend(entry_of(packs_rows=True), shard)


def test_what_an_entry_names_is_taken():
    entry = entry_of(packs_rows=True, per_head=("slopes",), takes=("dropout", "softcap"))
    documents = whole_rows(position_ids=torch.tensor([[0, 1, 0, 1]] * 2))
    output, weights = attend(entry, documents, dropout=0.1, softcap=3.0, slopes=torch.zeros(6))
    assert weights is None
    assert torch.equal(output, tensors()[2].repeat_interleave(3, dim=1).transpose(1, 2))

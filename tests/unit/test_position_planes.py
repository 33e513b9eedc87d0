"""`position_ids` with planes: cut on the last dimension, read by what the model is and never by their shape alone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longctx import PackingCollator, SequenceMesh, adapt, families, shard_batch
from hf_longctx.adapters.text_planes import add_text_planes
from hf_longctx.attention.contamination import assert_no_cross_document
from hf_longctx.data.shard_collator import ShardCollator
from hf_longctx.parallel.position_planes import rotary_positions, text_positions
from hf_longctx.parallel.shard import cut_batch
from hf_longctx.proof.tiny import shrink


def planes_of(rows: int, tokens: int, count: int = 3) -> torch.Tensor:
    """Every entry tells its plane, row and token."""
    plane, row, token = torch.meshgrid(*map(torch.arange, (count, rows, tokens)), indexing="ij")
    return 100 * plane + 10 * row + token


def segments(positions, axes=3, **others):
    batch = {"input_ids": torch.ones(positions.shape[-2:], dtype=torch.long), "position_ids": positions, **others}
    found = cut_batch(batch, 2, 0, position_axes=axes)["sequence_shard"].segment_ids
    return None if found is None else found.tolist()


# Cutting


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(2, 8, 3), (3, 3, 3), (3, 7, 4), (4, 4, 4), (1, 5, 3)])
def test_shares_of_planes_are_the_planes(size, shape):
    rows, tokens, count = shape
    ids, positions = torch.arange(rows * tokens).view(rows, tokens), planes_of(*shape)
    mask = torch.ones_like(ids)  # planes that differ tell no documents
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    shares = [cut_batch(batch, size, rank, position_axes=3) for rank in range(size)]
    local = -(-tokens // size)
    assert {share["position_ids"].shape for share in shares} == {(count, rows, local)}
    assert torch.equal(torch.cat([share["position_ids"] for share in shares], -1)[..., :tokens], positions)
    assert torch.equal(torch.cat([share["input_ids"] for share in shares], 1)[:, :tokens], ids)


def test_planes_of_one_row_serve_all_rows():
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "position_ids": torch.arange(4).expand(3, 1, 4)}
    assert cut_batch(batch, 2, 1, position_axes=3)["position_ids"].tolist() == [[[2, 3]] * 3] * 3


def test_the_largest_position_is_that_of_the_rotated_planes():
    text, rotated = torch.arange(8).view(1, 1, 8), torch.arange(8).view(1, 1, 8).expand(3, 1, 8) // 2
    batch = {"input_ids": torch.ones(1, 8, dtype=torch.long), "position_ids": torch.cat([text, rotated])}
    assert cut_batch(batch, 2, 0, position_axes=3)["sequence_shard"].num_positions == 4
    assert rotary_positions(rotated, 3).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]


# Documents


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1, 2]]


def test_documents_are_read_from_the_plane_of_the_text():
    image = torch.tensor([[[0, 1, 1, 1, 2, 3, 3, 4]], [[0, 1, 1, 2, 3, 4, 5, 6]], [[0, 1, 2, 1, 3, 4, 5, 6]]])
    assert segments(torch.cat([PACKED[None], image])) == DOCUMENTS
    assert segments(torch.cat([torch.arange(8).view(1, 1, 8), image])) is None
    assert segments(image) is None  # transformers reads none without that plane
    skips = torch.tensor([[[0, 1, 2, 7, 8, 9, 10, 11]]])
    assert segments(torch.cat([skips, image])) == [[0, 0, 0, 1, 1, 1, 1, 1]]  # as transformers reads a text's


def test_planes_that_are_alike_are_those_of_a_text():
    assert segments(PACKED.expand(3, 1, 8)) == segments(PACKED) == DOCUMENTS
    ahead = torch.tensor([[0, 1, 2, 9, 10, 11, 12, 13]])
    assert segments(ahead.expand(3, 1, 8)) is None  # which transformers attends over whole


def test_planes_of_images_that_restart_need_bounds_or_a_plane_of_the_text():
    image = torch.stack([PACKED, PACKED, PACKED + 1])
    with pytest.raises(NotImplementedError, match=r"\(3, 1, 8\), restarts within a row.*\(4, rows, tokens\)"):
        segments(image)
    bounds = torch.tensor([0, 3, 7, 8])
    assert segments(image, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds) == DOCUMENTS
    assert segments(torch.cat([PACKED[None], image])) == DOCUMENTS


def test_padding_is_no_restart():
    counted = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    expected = (mask - 1).tolist()
    for planes in (counted.expand(3, 2, 8), torch.stack([counted, counted, counted + mask])):
        assert segments(planes, attention_mask=mask) == expected


def test_a_mask_next_to_documents_is_refused():
    with pytest.raises(ValueError, match="drop `attention_mask`"):
        segments(PACKED.expand(3, 1, 8), attention_mask=torch.ones(1, 8, dtype=torch.long))


# Who says what the planes mean


WRONG_PLANES = {
    "nobody says": ((3, 3, 3), None, NotImplementedError, "nothing says which model"),
    "a model without planes": ((3, 3, 3), 0, NotImplementedError, "no 3-D multimodal rotary positions"),
    "tokens first": ((3, 8, 3), 3, ValueError, r"has shape \(3, 8, 3\).*\(3, 3, 8\), or \(4, 3, 8\)"),
    "too few": ((2, 3, 8), 3, ValueError, "has 3 axes"),
    "too many": ((5, 3, 8), 3, ValueError, "has 3 axes"),
    "other rows": ((3, 2, 8), 3, ValueError, "has 3 axes"),
    "other tokens": ((3, 3, 7), 3, ValueError, "has 3 axes"),
}


@pytest.mark.parametrize("case", WRONG_PLANES)
def test_planes_that_are_not_the_models_are_refused(case):
    shape, axes, error, message = WRONG_PLANES[case]
    tokens = 3 if shape == (3, 3, 3) else 8
    batch = {"input_ids": torch.ones(3, tokens, dtype=torch.long), "position_ids": torch.zeros(shape).long()}
    with pytest.raises(error, match=message):
        cut_batch(batch, 2, 0, position_axes=axes)


def text_model(kind: str, attention: str = "sdpa", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[kind]())
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModel.from_config(config, attn_implementation=attention).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def test_the_model_decides_in_the_loop_and_in_the_collator():
    mesh = SequenceMesh.build(1)
    ids, positions = torch.full((3, 3), 11), planes_of(3, 3)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    model = text_model("qwen2_vl_text", "ulysses")
    adapt(model, mesh)
    assert torch.equal(shard_batch(batch, mesh, model)["position_ids"], positions)
    assert torch.equal(ShardCollator(lambda rows: batch, mesh, position_axes=3)([1])["position_ids"], positions)
    other = text_model("llama", "ulysses")
    adapt(other, mesh)
    for refuse in (
        lambda: shard_batch(batch, mesh),
        lambda: shard_batch(batch, mesh, other),
        lambda: ShardCollator(lambda rows: batch, mesh)([1]),
    ):
        with pytest.raises(NotImplementedError, match=r"`position_ids` has shape \(3, 3, 3\).*pass 2-D"):
            refuse()


# One process: a decoder reads no documents without the plane of the text, and gets it


def one_by_one(model, ids, lengths):
    start, pieces = 0, []
    for length in lengths:
        pieces.append(model(input_ids=ids[:, start : start + length], use_cache=False)[0])
        start += length
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("kind", ["qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"])
@pytest.mark.parametrize("attention", ["packed", "ulysses"])
def test_packed_rows_of_one_process_are_their_documents(kind, attention):
    lengths = (3, 4, 1)
    ids = torch.arange(11, 19)[None]
    expected = one_by_one(text_model(kind), ids, lengths)
    model = text_model(kind, attention)
    handle = adapt(model, SequenceMesh.build(1))
    documents = [{"input_ids": part.tolist()} for part in ids[0].split(lengths)]
    packed = {key: value for key, value in PackingCollator(max_tokens=8)(documents).items() if key != "labels"}
    batches = [packed]
    batches += [
        {"input_ids": ids, "position_ids": p} for p in (PACKED, PACKED.expand(3, 1, 8), PACKED.expand(4, 1, 8))
    ]
    for batch in batches:
        torch.testing.assert_close(model(**batch, use_cache=False)[0], expected, rtol=1e-9, atol=1e-9)
        assert_no_cross_document(model, {key: value for key, value in batch.items() if key != "labels"})
    handle.remove()
    if kind != "qwen3_vl_text":  # which makes that plane itself
        assert not torch.allclose(model(**batches[1], use_cache=False)[0], expected)


def test_planes_of_one_document_are_left_alone():
    ids, image = torch.arange(11, 19)[None], torch.stack([torch.arange(8)[None] // step for step in (1, 2, 3)])
    expected, model = text_model("qwen2_vl_text"), text_model("qwen2_vl_text", "packed")
    add_text_planes(model)
    again = copy.deepcopy(model)
    for positions in (None, torch.arange(8)[None], image, torch.arange(8).expand(3, 1, 8), PACKED.expand(3, 1, 8)):
        batch = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        if positions is not None and positions.shape[0] == 3 and bool((positions == PACKED).all()):
            batch["attention_mask"] = torch.ones_like(ids)  # with which nobody reads documents
        for patched in (model, again):
            assert torch.equal(patched(**batch)[0], expected(**batch)[0])


def test_text_positions_without_planes_are_what_they_are():
    assert text_positions({"position_ids": PACKED}, 3) is PACKED and text_positions({}, 3) is None
    assert families.position_axes(CONFIG_MAPPING["llama"]()) == 0

"""Cutting a batch: every rank's share is computed here in one process, and the shares together are the batch again."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from hf_longctx import SequenceMesh, SequenceShard, shard_batch
from hf_longctx.parallel.mesh import validate_world_size
from hf_longctx.parallel.shard import cut_batch, segment_rows, validate_same_rows


SIZES = [1, 2, 3, 4, 7]
TOKENS = [1, 2, 3, 5, 23]
IGNORED = -100


def full_batch(tokens: int, rows: int = 2) -> dict[str, torch.Tensor]:
    """Rows in which every value is distinct, so that no permutation can hide; the second row is right padded."""
    ids = torch.arange(1, rows * tokens + 1).view(rows, tokens)
    mask = torch.ones_like(ids)
    mask[-1, tokens - tokens // 3 :] = 0
    return {
        "input_ids": ids,
        "labels": (ids + 1000).masked_fill(mask == 0, IGNORED),
        "position_ids": torch.arange(tokens).expand(rows, -1).clone(),
        "attention_mask": mask,
        "token_type_ids": ids % 2,
    }


def cut_all(batch, size: int, **options) -> list[dict]:
    return [cut_batch(batch, size, rank, **options) for rank in range(size)]


def together(shares: list[dict], key: str) -> torch.Tensor:
    return torch.cat([share[key] for share in shares], dim=1)


def segments_of(batch, size: int = 1) -> list:
    segments = cut_batch(batch, size, 0)["sequence_shard"].segment_ids
    return None if segments is None else segments.tolist()


# Cutting and putting together


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
def test_shard_then_concat_is_identity(size, tokens):
    batch = full_batch(tokens)
    shares = cut_all(batch, size)
    local_len = -(-tokens // size)
    for key, value in batch.items():
        assert all(share[key].shape == (2, local_len) for share in shares)
        assert torch.equal(together(shares, key)[:, :tokens], value), key


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
def test_labels_are_shifted_over_the_whole_row_and_then_cut(size, tokens):
    batch = full_batch(tokens)
    shifted = together(cut_all(batch, size), "shift_labels")
    for row in range(2):
        for token in range(shifted.shape[1]):
            expected = batch["labels"][row, token + 1] if token + 1 < tokens else IGNORED
            assert shifted[row, token] == expected


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
def test_pad_segment_counts_no_loss_and_is_seen_by_nobody(size, tokens):
    batch = full_batch(tokens)
    shares = cut_all(batch, size)
    for key, fill in (("labels", IGNORED), ("shift_labels", IGNORED), ("attention_mask", 0), ("input_ids", 0)):
        assert (together(shares, key)[:, tokens:] == fill).all(), key
    for share in shares:
        shard = share["sequence_shard"]
        if shard.segment_ids is not None:  # they describe the user's own rows; the kernel never sees the pad segment
            assert shard.segment_ids.shape == (2, tokens)
            assert shard.segment_ids.dtype == torch.int32


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
def test_shards_agree_on_the_row_and_their_tokens_sum_to_it(size, tokens):
    shards = [share["sequence_shard"] for share in cut_all(full_batch(tokens), size, inner_attention="eager")]
    assert [(shard.size, shard.rank) for shard in shards] == [(size, rank) for rank in range(size)]
    assert sum(shard.num_local_tokens for shard in shards) == tokens
    assert {(shard.num_tokens, shard.local_len) for shard in shards} == {(tokens, -(-tokens // size))}
    assert {shard.inner_attention for shard in shards} == {"eager"}
    assert len({shard.row_hash for shard in shards}) == 1


def test_rows_shorter_than_ranks_leave_whole_ranks_to_the_pad_segment():
    shares = cut_all({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}, 4)
    assert together(shares, "input_ids").tolist() == [[5, 6, 7, 0]]
    assert together(shares, "shift_labels").tolist() == [[6, 7, IGNORED, IGNORED]]
    assert together(shares, "attention_mask").tolist() == [[1, 1, 1, 0]]
    assert [share["sequence_shard"].num_local_tokens for share in shares] == [1, 1, 1, 0]
    assert shares[3]["sequence_shard"].segment_ids is None


def test_positions_are_those_of_the_whole_row_when_the_batch_has_none():
    shares = cut_all({"input_ids": torch.ones(2, 6, dtype=torch.long)}, 3)
    assert [share["position_ids"].tolist() for share in shares] == [[[0, 1]] * 2, [[2, 3]] * 2, [[4, 5]] * 2]


def test_one_row_of_positions_serves_all_rows():
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    share = cut_batch(batch, 2, 1)
    assert share["position_ids"].tolist() == [[0, 1], [0, 1]]
    assert share["sequence_shard"].segment_ids.tolist() == [[0, 0, 1, 1]] * 2


def test_mask_is_added_only_where_padding_was():
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert "attention_mask" not in cut_batch(batch, 2, 0)
    assert "attention_mask" in cut_batch(batch, 3, 0)


def test_masked_language_model_labels_stay_at_their_position():
    share = cut_batch(full_batch(6), 3, 1, shift_labels=False)
    assert "shift_labels" not in share
    assert torch.equal(share["labels"], full_batch(6)["labels"][:, 2:4])


def test_given_shift_labels_are_cut_and_not_made_again():
    batch = full_batch(6)
    batch["shift_labels"] = batch["labels"] + 5000
    assert torch.equal(cut_batch(batch, 3, 1)["shift_labels"], batch["shift_labels"][:, 2:4])


def test_embeddings_are_cut_along_tokens_and_keep_their_gradient():
    embeds = torch.randn(2, 5, 3, requires_grad=True)
    upstream = torch.randn(2, 6, 3)
    shares = cut_all({"inputs_embeds": embeds}, 2)
    assert torch.equal(together(shares, "inputs_embeds")[:, :5], embeds)
    assert (together(shares, "inputs_embeds")[:, 5:] == 0).all()
    (together(shares, "inputs_embeds") * upstream).sum().backward()
    assert torch.equal(embeds.grad, upstream[:, :5])


def test_batch_is_not_changed_and_plain_values_pass_through():
    batch = {**full_batch(5), "num_items": 7, "scale": torch.tensor(2.0), "labels_of_nothing": None}
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    share = cut_batch(batch, 2, 1)
    assert share["num_items"] == 7 and share["scale"] == 2.0 and "labels_of_nothing" not in share
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], before[key]) for key in full_batch(5))


# Documents and padding


def test_full_rows_have_no_segments():
    batch = full_batch(6)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    shard = cut_batch(batch, 2, 0)["sequence_shard"]
    assert shard.segment_ids is None and shard.only_right_padding


@pytest.mark.parametrize(
    ("mask", "only_right"),
    [
        ([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], True),
        ([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], False),
        ([[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]], False),
    ],
)
def test_segments_from_a_padding_mask(mask, only_right):
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": torch.tensor(mask)}
    shard = cut_batch(batch, 4, 0)["sequence_shard"]
    expected = [[0 if valid else -1 for valid in row] for row in mask]
    assert shard.segment_ids.tolist() == expected
    assert shard.only_right_padding is only_right


def test_segments_from_restarting_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "position_ids": positions}
    shard = cut_batch(batch, 4, 1)["sequence_shard"]
    assert shard.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]]
    assert not shard.only_right_padding


def test_segments_from_restarting_positions_are_those_of_the_host():
    from transformers.masking_utils import find_packed_sequence_indices

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        positions = torch.randint(0, 3, (3, 9), generator=generator).cumsum(1) % 6
        segments, _ = segment_rows({"position_ids": positions}, 3, 9, torch.device("cpu"))
        assert segments.tolist() == find_packed_sequence_indices(positions).tolist()


def test_positions_that_start_late_are_one_document():
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "position_ids": torch.tensor([[7, 8, 9, 10]])}
    assert segments_of(batch) is None


@pytest.mark.parametrize("mask_rows", [[[0, 0, 0, 1, 1, 1]], [[1, 1, 1, 1, 0, 0]], [[0, 1, 1, 1, 1, 0]]])
def test_positions_of_padding_are_not_taken_for_packing(mask_rows):
    mask = torch.tensor(mask_rows)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    batch = {"input_ids": torch.ones_like(mask), "attention_mask": mask, "position_ids": positions}
    assert segments_of(batch) == [[0 if valid else -1 for valid in mask_rows[0]]]
    shares = cut_all(batch, 2)
    assert torch.equal(together(shares, "position_ids"), positions)


@pytest.mark.parametrize("as_list", [False, True])
def test_segments_from_cumulative_lengths_and_bounds_are_dropped(as_list):
    bounds = [0, 2, 3, 7] if as_list else torch.tensor([0, 2, 3, 7], dtype=torch.int32)
    batch = {
        "input_ids": torch.ones(1, 7, dtype=torch.long),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 4,
        "max_length_k": torch.tensor(4),
        "seq_idx": torch.tensor([[0, 0, 1, 2, 2, 2, 2]]),
    }
    share = cut_batch(batch, 2, 0)
    assert share["sequence_shard"].segment_ids.tolist() == [[0, 0, 1, 2, 2, 2, 2]]
    assert not share["sequence_shard"].only_right_padding
    assert not set(share) & {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def test_cumulative_lengths_of_one_document_are_no_packing():
    assert (
        segments_of({"input_ids": torch.ones(1, 5, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 5])}) is None
    )


# Refusals


IDS = torch.ones(2, 6, dtype=torch.long)
REFUSED = {
    "images": ({"input_ids": IDS, "pixel_values": torch.ones(2, 3, 4, 4)}, NotImplementedError, "`pixel_values`"),
    "audio": ({"input_ids": IDS, "input_features": torch.ones(2, 6, 4)}, NotImplementedError, "`input_features`"),
    "3-D positions": (
        {"input_ids": IDS, "position_ids": torch.ones(3, 2, 6, dtype=torch.long)},
        NotImplementedError,
        r"`position_ids` has shape \(3, 2, 6\).*pass 2-D",
    ),
    "4-D mask": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)},
        NotImplementedError,
        r"`attention_mask` has shape \(2, 1, 6, 6\).*2-D padding mask",
    ),
    "no token dimension": (
        {"input_ids": IDS, "labels": torch.tensor([0, 1])},
        ValueError,
        r"`labels` has shape \(2,\), but a sharded batch needs \(2, 6, ...\)",
    ),
    "other length": (
        {"input_ids": IDS, "labels": IDS[:, :5]},
        ValueError,
        r"`labels` has shape \(2, 5\)",
    ),
    "other rows": ({"input_ids": IDS, "token_type_ids": torch.ones(3, 6)}, ValueError, "`token_type_ids`"),
    "mask and packed positions": (
        {"input_ids": IDS, "attention_mask": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)},
        ValueError,
        "drop `attention_mask`",
    ),
    "mask and packed bounds": (
        {"input_ids": IDS[:1], "attention_mask": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 2, 6])},
        ValueError,
        "drop `attention_mask`",
    ),
    "bounds too short": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 2, 5])},
        ValueError,
        r"\[0, 2, 5\].*rise from 0 to the 6 tokens",
    ),
    "bounds from one": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([1, 6])},
        ValueError,
        r"\[1, 6\].*rise "
        "from 0",
    ),
    "bounds of several rows": (
        {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 2, 6])},
        ValueError,
        r"2 row\(s\): flatten the batch",
    ),
    "2-D bounds": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([[0, 2, 6]])},
        ValueError,
        r"`cu_seq_lens_q`.*shape \(1, 3\)",
    ),
    "no tokens": ({"labels": IDS}, ValueError, r"`batch` \(labels\) needs `input_ids` or `inputs_embeds`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_input_that_cannot_be_cut_is_refused_by_name(case):
    batch, error, message = REFUSED[case]
    for size in (1, 2):
        with pytest.raises(error, match=message):
            cut_batch(batch, size, 0)


def test_sharded_batch_is_not_sharded_again():
    with pytest.raises(ValueError, match="already sharded"):
        cut_batch(cut_batch(full_batch(6), 2, 0), 2, 0)


# Same rows on every rank


def test_digest_is_equal_for_equal_rows_and_differs_for_others():
    def digest(**changes):
        return cut_batch({**full_batch(6), **changes}, 2, 0)["sequence_shard"].row_hash

    original = full_batch(6)
    assert digest() == digest()
    hashes = [digest()]
    for key in ("input_ids", "labels"):
        other = original[key].clone()
        other[0, 3] += 1
        hashes.append(digest(**{key: other}))
        hashes.append(digest(**{key: original[key].flip(0)}))
    hashes.append(digest(attention_mask=torch.ones_like(original["attention_mask"])))
    hashes.append(digest(labels=None))
    assert len(set(hashes)) == len(hashes)


def test_digest_sees_the_shape_of_a_batch():
    flat, square = torch.arange(8).view(1, 8), torch.arange(8).view(2, 4)
    hashes = {cut_batch({"input_ids": ids}, 1, 0)["sequence_shard"].row_hash for ids in (flat, square)}
    assert len(hashes) == 2


# SequenceShard


def test_shard_survives_pickle():
    shard = cut_batch(full_batch(5), 2, 1, inner_attention="eager")["sequence_shard"]
    copy = pickle.loads(pickle.dumps(shard))
    for field in dataclasses.fields(SequenceShard):
        before, after = getattr(shard, field.name), getattr(copy, field.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    assert copy.group is None and copy.segment_ids is not None


def test_shard_moves_like_a_tensor():
    shard = cut_batch(full_batch(5), 2, 1)["sequence_shard"]
    moved = shard.to("meta", non_blocking=True)
    assert moved.segment_ids.device.type == "meta" and shard.segment_ids.device.type == "cpu"
    assert (moved.rank, moved.row_hash) == (shard.rank, shard.row_hash)
    plain = SequenceShard(size=2, rank=0, num_tokens=4, local_len=2)
    assert plain.to("meta") is plain


def test_shard_is_immutable_and_no_tuple():
    shard = SequenceShard(size=2, rank=0, num_tokens=4, local_len=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        shard.rank = 1
    assert not isinstance(shard, tuple)  # transformers' trainer takes tuples apart


def test_kernel_plans_belong_to_one_batch():
    shard = SequenceShard(size=2, rank=0, num_tokens=4, local_len=2)
    shard.kernel_plans["rule"] = 1
    assert shard.kernel_plans == {"rule": 1}
    assert shard.bind(SequenceMesh.build()).kernel_plans == {}


# Mesh and shard_batch in one process


def test_mesh_of_one_process_needs_no_process_group():
    assert not torch.distributed.is_initialized()
    mesh = SequenceMesh.build()
    assert mesh == SequenceMesh(1, 1, 0, 0) and mesh.sp_group is None and mesh.world_size == 1


def test_mesh_of_two_without_a_process_group_is_refused_with_the_remedy():
    with pytest.raises(RuntimeError) as error:
        SequenceMesh.build(2)
    assert "`sequence_parallel_size` (2)" in str(error.value)
    assert "torchrun --nproc_per_node 2" in str(error.value) and "init_process_group" in str(error.value)


@pytest.mark.parametrize("size", [0, -2, True, "2"])
def test_mesh_refuses_a_size_that_is_no_positive_integer(size):
    with pytest.raises(ValueError, match="`sequence_parallel_size`"):
        SequenceMesh.build(size)


@pytest.mark.parametrize(
    ("world_size", "size", "remedy"),
    [
        (6, 4, "start 8 processes, or set it to 1 or 2 or 3 or 6."),
        (2, 3, "start 3 processes, or set it to 1 or 2."),
        (7, 2, "start 8 processes, or set it to 1 or 7."),
    ],
)
def test_size_that_does_not_divide_the_world_is_refused_with_sizes_that_do(world_size, size, remedy):
    with pytest.raises(ValueError) as error:
        validate_world_size(world_size, size)
    expected = f"`sequence_parallel_size` ({size}) must divide the number of processes ({world_size}): {remedy}"
    assert str(error.value) == expected
    assert int(remedy.split()[1]) % size == 0


def test_dividing_sizes_are_accepted():
    for size in (1, 2, 3, 6):
        validate_world_size(6, size)


def test_shard_batch_counts_the_valid_tokens_of_the_full_rows():
    batch = full_batch(6)
    valid = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert valid == 8
    for rank in range(3):
        mesh = SequenceMesh(1, 3, 0, rank)
        assert shard_batch(batch, mesh)["num_items_in_batch"] * 3 == pytest.approx(valid)
        assert shard_batch(batch, mesh, shift_labels=False)["num_items_in_batch"] * 3 == pytest.approx(10)
        nothing = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
        assert shard_batch(nothing, mesh)["num_items_in_batch"] * 3 == pytest.approx(1)
    unlabelled = {"input_ids": batch["input_ids"]}
    assert "num_items_in_batch" not in shard_batch(unlabelled, SequenceMesh.build())


def test_shard_batch_on_one_process_keeps_the_rows_whole():
    batch = full_batch(5)
    share = shard_batch(batch, SequenceMesh.build())
    assert all(torch.equal(share[key], batch[key]) for key in batch)
    assert share["sequence_shard"].size == 1 and share["sequence_shard"].group is None


def test_one_rank_always_has_the_same_rows_as_itself():
    validate_same_rows(cut_batch(full_batch(5), 1, 0)["sequence_shard"])


@pytest.mark.parametrize(
    "bounds", [{"cu_seq_lens_k": torch.tensor([0, 2, 5])}, {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])}]
)
def test_documents_are_kept_apart_whichever_fact_names_them(bounds):
    batch = {"input_ids": torch.ones(1, 5, dtype=torch.long), **bounds}
    assert segments_of(batch, 2) == [[0, 0, 1, 1, 1]]


def test_bounds_that_fall_or_disagree_are_refused():
    ids = torch.ones(1, 4, dtype=torch.long)
    for bounds in ({"cu_seq_lens_q": [0, 3, 2, 4]}, {"cu_seq_lens_q": [0, 2, 4], "cu_seq_lens_k": [0, 3, 4]}):
        with pytest.raises(ValueError, match="must rise from 0 to the 4 tokens.*equal `cu_seq_lens_k`"):
            cut_batch({"input_ids": ids, **bounds}, 2, 0)


def test_one_row_of_mask_serves_all_rows():
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    assert segments_of(batch, 2) == [[-1, 0, 0, 0]] * 2
    assert cut_batch(batch, 2, 0)["attention_mask"].tolist() == [[0, 1]] * 2


def test_embeddings_count_in_the_checksum():
    hashes = {
        cut_batch({"inputs_embeds": torch.full((1, 4, 2), x)}, 2, 0)["sequence_shard"].row_hash for x in (1.0, 2.0)
    }
    assert len(hashes) == 2

"""Every file of a checkpoint, damaged in every way that disks, copies and people do: none is taken for whole.

The checkpoints are tiny and laid out as transformers, accelerate, PEFT and sentence-transformers do; what is called is
what a resumed run calls first. Real runs that are resumed stand in `tests/world/test_resume.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from hf_longctx.resilience.checkpoint_files import check_whole, last_whole_checkpoint
from hf_longctx.resilience.checkpoint_record import RUN_FILE, SEAL, UNFINISHED, hash_file, list_files, write_record
from hf_longctx.resilience.rotation import rotate_checkpoints

from .test_embedding_trainer import run as train_embedder


FACTS = {"world_size": 2, "seed": 5}


def state_of(folder, step, ranks):
    """What every checkpoint has; nothing is alike in two of them."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 3}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "step": step}))
    (folder / "training_args.bin").write_bytes(b"PK arguments %d" % step)
    torch.save({"step": step}, folder / "scheduler.pt")
    for rank in range(ranks):
        name = "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"
        torch.save({"cpu": torch.full((20,), step + rank)}, folder / name)


def whole(folder, step, ranks=1):
    state_of(folder, step, ranks)
    torch.save({"state": torch.full((20,), float(step))}, folder / "optimizer.pt")
    save_file({"weight": torch.full((8,), float(step))}, folder / "model.safetensors")


def two_ranks(folder, step):
    whole(folder, step, ranks=2)


def in_parts(folder, step):
    """As transformers cuts large models: an index and its files."""
    whole(folder, step)
    (folder / "model.safetensors").unlink()
    parts = {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate(("first", "second"), 1)}
    for name, part in parts.items():
        save_file({name: torch.full((8,), float(step))}, folder / part)
    index = {"metadata": {"step": step}, "weight_map": parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder, step):
    whole(folder, step)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": step}))
    (folder / "second").mkdir()  # PEFT gives every adapter but "default" a folder
    save_file({"weight": torch.full((8,), float(-step))}, folder / "second" / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to save in a single process")
def shards(folder, step):
    """FSDP with `SHARDED_STATE_DICT`."""
    state_of(folder, step, ranks=2)
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        state = {"model": {"weight": torch.full((8,), float(step))}, "lr": float(step)}
        dcp.save(state, checkpoint_id=folder / name, no_dist=True)


def full_state(folder, step):
    """FSDP with `FULL_STATE_DICT`."""
    state_of(folder, step, ranks=2)
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        torch.save({"weight": torch.full((20,), float(step))}, folder / name)


LAYOUTS = [whole, two_ranks, in_parts, adapter, shards, full_state]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\n")


def zero_tail(path):
    content = path.read_bytes()
    kept = len(content.rstrip(b"\0")) - 1
    path.write_bytes(content[:kept] + b"\0" * (len(content) - kept))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete(path):
    path.unlink()


DAMAGES = [truncate, empty, lengthen, zero_tail, flip, delete]


def assert_every_damage_shows(output_dir, old, new):
    """Each file of `new` x each damage, and each file taken from `old`: `old` is chosen instead."""
    names = [*list_files(new), RUN_FILE, SEAL]
    assert len(names) >= 8
    for name in names:
        path, other = new / name, old / name
        content = path.read_bytes()
        damages = list(DAMAGES)
        if other.is_file() and other.read_bytes() != content:
            damages.append(lambda path, other=other: path.write_bytes(other.read_bytes()))
        for damage in damages:
            damage(path)
            assert last_whole_checkpoint(output_dir) == old, f"{name}: {getattr(damage, '__name__', 'swapped')}"
            with pytest.raises(ValueError, match=r"resume|Resume"):
                check_whole(new)
            path.write_bytes(content)
    assert last_whole_checkpoint(output_dir) == new


@pytest.fixture
def made(tmp_path, request):
    """Two whole checkpoints of one layout."""
    folders = [tmp_path / "checkpoint-3", tmp_path / "checkpoint-6"]
    for folder in folders:
        request.param(folder, int(folder.name[-1]))
        write_record(folder, FACTS)
    return folders


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to save in a single process")
@pytest.mark.parametrize("made", LAYOUTS, indirect=True)
def test_no_damage_of_any_file_goes_unseen(made):
    assert_every_damage_shows(made[0].parent, *made)


def test_no_damage_of_an_embedding_run_goes_unseen(tmp_path):
    """A real one: modules in folders, a learned temperature, the model card."""
    settings = {"loss": "learnable", "attention": "packed", "max_steps": 2}
    train_embedder(**settings, save_strategy="steps", save_steps=1, folder=str(tmp_path))
    folders = [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]
    assert {"modules.json", "1_Pooling/config.json", "loss.safetensors"} <= set(list_files(folders[1]))
    assert_every_damage_shows(tmp_path, *folders)


@pytest.mark.parametrize("made", [two_ranks], indirect=True)
def test_two_ranks_share_the_reading_and_one_of_them_sees_it(made):
    _, new = made
    for name in list_files(new):
        content = (new / name).read_bytes()
        flip(new / name)
        seen = []
        for rank in range(2):
            try:
                check_whole(new, share=(rank, 2))
            except ValueError:
                seen.append(rank)
        assert seen, name
        (new / name).write_bytes(content)


@pytest.mark.parametrize("made", [whole], indirect=True)
def test_a_file_that_was_not_saved_with_it_and_would_be_read_is_refused(made):
    _, new = made
    shutil.copy(new / "rng_state.pth", new / "rng_state_1.pth")
    with pytest.raises(ValueError, match=r"rng_state_1.pth` was not saved with this checkpoint, and resuming would"):
        check_whole(new)
    (new / "rng_state_1.pth").rename(new / "notes.txt")
    check_whole(new)


@pytest.mark.parametrize("made", [whole], indirect=True)
def test_a_record_without_sizes_is_a_sentence(made, tmp_path):
    _, new = made
    for files in ([], {"config.json": 3}, {"config.json": {"bytes": "3", "sha256": ""}}):
        (new / RUN_FILE).write_text(json.dumps({"files": files}))
        (new / SEAL).write_text(f"{hash_file(new / RUN_FILE)}  {RUN_FILE}\n")
        with pytest.raises(ValueError, match="has no `bytes` and `sha256` for each of its `files`: resume"):
            check_whole(new)


# Without a record: of the stock trainer, or older


def flip_data(path):
    """In what torch wrote a checksum for, which is not the padding."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(archive.infolist()[0])
    content[content.find(pickled) + len(pickled) - 2] ^= 1
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to save in a single process")
@pytest.mark.parametrize("made", LAYOUTS, indirect=True)
def test_without_a_record_it_loads_and_what_can_be_checked_is(made):
    old, new = made
    for name in (RUN_FILE, SEAL):
        (new / name).unlink()
    check_whole(new)
    (new / RUN_FILE).write_text(json.dumps(FACTS))  # ours, before there were records of files
    check_whole(new)
    found = {
        truncate: (".pt", ".pth", ".safetensors", "fsdp.bin", "optimizer.bin", ".json"),
        flip_data: (".pt", ".pth", "fsdp.bin", "optimizer.bin"),
    }
    for damage, ends in found.items():
        for name in list_files(new):
            if name.endswith(ends):
                content = (new / name).read_bytes()
                damage(new / name)
                assert last_whole_checkpoint(new.parent) == old, f"{name}: {damage.__name__}"
                (new / name).write_bytes(content)


def test_torch_files_without_checksums_pass(tmp_path):
    whole(tmp_path / "checkpoint-3", 3)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state": torch.ones(20)}, tmp_path / "checkpoint-3" / "optimizer.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    check_whole(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"global_step": True}, "has no `global_step`"),
        ({"global_step": -1}, "has no `global_step`"),
        ({"global_step": 3, "unheard_of": 1}, "is no state of a trainer .*unheard_of.*: resume from another"),
    ],
)
def test_state_that_transformers_cannot_read_is_a_sentence(tmp_path, content, message):
    whole(tmp_path / "checkpoint-3", 3)
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        check_whole(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "names no file for each tensor"),
        ({"weight_map": {"first": 3}}, "names no file for each tensor"),
        ({"weight_map": {"first": "model-00002-of-00002.safetensors"}}, "lacks `first`, against"),
        ({"weight_map": {"first": "model-00003-of-00003.safetensors"}}, "is missing, cut off or damaged"),
        ({"weight_map": {"first": "model-00003-of-00003.bin"}}, "is missing, and .* names it"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, index, message):
    in_parts(tmp_path / "checkpoint-3", 3)
    (tmp_path / "checkpoint-3" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        check_whole(tmp_path / "checkpoint-3")


# `save_total_limit`


def folders_of(output_dir, steps):
    """Whole checkpoints whose files are the older, the later their step."""
    for age, step in enumerate(steps):
        folder = output_dir / f"checkpoint-{step}"
        whole(folder, step)
        write_record(folder, FACTS)
        os.utime(folder, (1e9 - 100 * age, 1e9 - 100 * age))


def left_in(output_dir):
    return sorted(int(path.name.partition("-")[2]) for path in output_dir.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [3, 6, 9, 12]),
        (0, None, [3, 6, 9, 12]),
        (1, None, [12]),
        (2, None, [9, 12]),
        (1, 3, [3, 12]),
        (2, 3, [3, 12]),
        (3, 3, [3, 9, 12]),
        (1, 12, [12]),
    ],
)
def test_the_oldest_go_by_step_and_not_by_time(tmp_path, limit, best, left, monkeypatch):
    folders_of(tmp_path, [3, 6, 9, 12])
    monkeypatch.chdir(tmp_path)  # the state of a run may name the best one by another path
    rotate_checkpoints(tmp_path / "checkpoint-12", limit, None if best is None else f"checkpoint-{best}")
    assert left_in(tmp_path) == left


def test_what_is_not_whole_goes_first_and_counts_for_nothing(tmp_path):
    folders_of(tmp_path, [3, 6, 9, 12])
    (tmp_path / "checkpoint-9" / UNFINISHED).touch()
    rotate_checkpoints(tmp_path / "checkpoint-12", 3)
    assert left_in(tmp_path) == [3, 6, 12]


def test_neither_the_written_nor_the_newest_whole_one_is_deleted(tmp_path, caplog):
    """A run in the folder of an earlier one, which came further."""
    folders_of(tmp_path, [3, 6, 9, 12])
    truncate(tmp_path / "checkpoint-12" / "optimizer.pt")
    rotate_checkpoints(tmp_path / "checkpoint-3", 1)
    assert left_in(tmp_path) == [3, 9]
    assert "checkpoint-9` is of an earlier run and has a later step than `checkpoint-3`: it is kept" in caplog.text

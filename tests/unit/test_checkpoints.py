"""A folder that cannot continue a run is refused by name: folders made by hand, each with one thing wrong.

Whole runs that are saved, spoiled and resumed stand in `tests/world/test_resume.py`.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from hf_longctx.resilience import checkpoints
from hf_longctx.resilience.checkpoint_weights import check_weights
from hf_longctx.resilience.checkpoints import check_whole, choose_checkpoint
from hf_longctx.resilience.run_facts import RUN_FILE, check_rows


def linear() -> torch.nn.Linear:
    model = torch.nn.Linear(2, 3)
    model.config = SimpleNamespace(model_type="llama")
    return model


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def save_sharded(folder, with_optimizer=True):
    """As FSDP2 saves: a folder for the weights and one for the optimizer."""
    parts = {"pytorch_model_fsdp_0": {"model": linear().state_dict()}, "optimizer_0": {"state": torch.zeros(2)}}
    for name, state in parts.items():
        if name != "optimizer_0" or with_optimizer:
            dcp.save(state, checkpoint_id=folder / name, no_dist=True)


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint of `linear()`."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    write(folder, "trainer_state.json", {"global_step": 3})
    write(folder, "config.json", {"model_type": "llama"})
    save_file(linear().state_dict(), folder / "model.safetensors")
    torch.save({}, folder / "optimizer.pt")
    return folder


@pytest.fixture
def sharded(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
        save_sharded(checkpoint)
    return checkpoint


def trainer_of(folder, **changes):
    args = {"output_dir": str(folder), "process_index": 0, "world_size": 1, "ignore_data_skip": False, **changes}
    return SimpleNamespace(args=SimpleNamespace(**args), is_deepspeed_enabled=False, is_fsdp_enabled=False)


def test_whole_folders_pass(checkpoint):
    check_whole(checkpoint)
    check_weights(linear(), checkpoint)


def test_whole_sharded_folders_pass(sharded):
    check_whole(sharded)
    check_weights(linear(), sharded, is_fsdp=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainer_state.json", "{", "trainer_state.json` cannot be read .*: resume from another checkpoint"),
        ("trainer_state.json", [3], "trainer_state.json` holds no JSON object: resume from another checkpoint"),
        ("trainer_state.json", {}, "trainer_state.json` has no `global_step`: resume from another checkpoint"),
        ("optimizer.pt", "0", r"optimizer.pt` \(1 bytes\) is cut off or was not written by torch: resume from"),
        ("model.safetensors", "0", "model.safetensors` is missing, cut off or damaged .*: resume from another"),
    ],
)
def test_file_that_is_not_whole_is_named(checkpoint, name, content, message):
    write(checkpoint, name, content)
    with pytest.raises(ValueError, match=message):
        check_whole(checkpoint)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` \('.*none'\) is not a folder: name one that"):
        check_whole(tmp_path / "none")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="trainer_state.json` cannot be read"):
        check_whole(tmp_path / "checkpoint-3")


def test_facts_of_a_run_that_cannot_be_read_are_refused(checkpoint):
    write(checkpoint, RUN_FILE, "{")
    with pytest.raises(ValueError, match="hf_longctx.json` cannot be read"):
        check_rows(trainer_of(checkpoint.parent), checkpoint)


OTHER_MODEL = "model.safetensors` is of another model: "


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": (3, 2)}, OTHER_MODEL + "it lacks `bias`; resume from a checkpoint of the same model"),
        (
            {"weight": (3, 2), "bias": (3,), "scale": (3,)},
            OTHER_MODEL + "it has, and the model lacks, `scale`; resume from a checkpoint of the same model",
        ),
        (
            {"weight": (5, 2), "bias": (3,)},
            OTHER_MODEL + r"`weight` has shape \(5, 2\) there and \(3, 2\) here; resume from a checkpoint of the same",
        ),
    ],
)
@pytest.mark.parametrize("has_index", [False, True])
def test_weights_of_another_model_are_named(checkpoint, weights, message, has_index):
    (checkpoint / "model.safetensors").unlink()
    part = "model-1.safetensors" if has_index else "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in weights.items()}, checkpoint / part)
    if has_index:
        write(checkpoint, "model.safetensors.index.json", {"weight_map": dict.fromkeys(weights, part)})
        message = message.replace("model.safetensors`", "model.safetensors.index.json`")
    with pytest.raises(ValueError, match=message):
        check_weights(linear(), checkpoint)


def test_checkpoint_without_weights_or_of_another_type_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match="model.safetensors` is missing, and the run trains a whole model: resume from a checkpoint",
    ):
        check_weights(linear(), checkpoint)
    write(checkpoint, "config.json", {"model_type": "gpt2"})
    with pytest.raises(ValueError, match="describes a model of type 'gpt2', and this run trains 'llama': resume from"):
        check_weights(linear(), checkpoint)
    write(checkpoint, "config.json", "{")
    with pytest.raises(ValueError, match="config.json` cannot be read"):
        check_weights(linear(), checkpoint)


def test_sharded_weights_that_are_cut_off_are_refused(sharded):
    path = sharded / "pytorch_model_fsdp_0" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"distcp` has 10 bytes, fewer than its `\.metadata` says: resume from"):
        check_weights(linear(), sharded, is_fsdp=True)
    (sharded / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"metadata` is missing or damaged .*: resume from another checkpoint"):
        check_weights(linear(), sharded, is_fsdp=True)


def test_sharded_weights_without_their_optimizer_are_refused(sharded):
    (sharded / "optimizer_0" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"optimizer_0/\.metadata` is missing: the optimizer would start anew"):
        check_weights(linear(), sharded, is_fsdp=True)


def test_shards_are_not_opened_by_a_run_without_fsdp(sharded, monkeypatch):
    monkeypatch.setattr("hf_longctx.resilience.checkpoint_weights.check_shards", None)
    with pytest.raises(
        ValueError, match="pytorch_model_fsdp_0` holds the shards of a run under FSDP, and this run is"
    ):
        check_weights(linear(), sharded)


# Which checkpoint is taken


def test_nothing_to_resume_from_is_refused(checkpoint):
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"`resume_from_checkpoint` is True, but `output_dir` \('.*'\) holds no whole checkpoint",
    ):
        choose_checkpoint(trainer_of(checkpoint.parent), True)


def test_nodes_with_folders_of_their_own_are_refused(checkpoint, monkeypatch):
    """Rank 1 finds no folder at all, and says so when it is asked for rank 0's."""
    other = {list: [], str: "it is no folder"}
    torch.save({}, checkpoint / "scheduler.pt")
    monkeypatch.setattr(
        checkpoints, "_gather", lambda _, mine: [mine, other.get(type(mine), "it is no folder" if mine is None else 0)]
    )
    with pytest.raises(
        ValueError, match="the ranks found different newest checkpoints .*checkpoint-3, rank 1: None.*: give all nodes"
    ):
        choose_checkpoint(trainer_of(checkpoint.parent, world_size=2), True)


@pytest.mark.parametrize(
    ("faults", "told"),
    [([None, "no.", "not."], r"^no\. \(seen by rank 1\)$"), (["no.", "not."], r"^no\.$")],
)
def test_all_ranks_are_told_what_the_first_has_seen(faults, told):
    with pytest.raises(ValueError, match=told):
        checkpoints._refuse_everywhere(faults)


# Shared by ranks and nodes


def places_of(monkeypatch, places, faults):
    """Ranks at these places, of which each has found this; the real one is rank 0."""
    answers = iter([places, faults])
    monkeypatch.setattr(checkpoints, "_gather", lambda *_: next(answers))


def test_a_fault_in_the_share_of_one_rank_is_one_for_all_on_its_folder(checkpoint, monkeypatch):
    stat = checkpoint.stat()
    here = (checkpoints.socket.gethostname(), stat.st_dev, stat.st_ino, stat.st_mtime_ns)
    shares = []
    places_of(monkeypatch, [here, here, "elsewhere"], [None, "damaged.", None])
    found = checkpoints._faults(trainer_of(checkpoint), checkpoint, lambda _, folder, share: shares.append(share))
    assert shares == [(0, 2)] and found == ["damaged.", "damaged.", None]
    places_of(monkeypatch, [here, "elsewhere"], [None, None])
    assert checkpoints._faults(trainer_of(checkpoint), checkpoint, lambda *_: None) == [None, None]


# How one is written


@pytest.fixture
def writer(checkpoint, monkeypatch):
    """Writes `checkpoint-3` anew, which is whole already; `write` is what transformers does."""
    trainer = trainer_of(checkpoint.parent, should_save=True)
    trainer.state = SimpleNamespace(best_model_checkpoint=None)
    monkeypatch.setattr(checkpoints, "run_facts", lambda _: {})
    return lambda write, **options: checkpoints.write_checkpoint(trainer, checkpoint, write, **options)


def test_the_same_step_written_again_never_leaves_less_than_before(checkpoint, writer):
    def write_state():
        assert (checkpoint / checkpoints.UNFINISHED).is_file() and not (checkpoint / "optimizer.pt").exists()
        write(checkpoint, "trainer_state.json", {"global_step": 3})

    def fail(error):
        raise error

    content = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(RuntimeError, match="No space left.*removed. The last whole checkpoint is `.*checkpoint-3`"):
        writer(lambda: fail(OSError("No space left")))
    assert (checkpoint / "model.safetensors").read_bytes() == content
    with pytest.raises(KeyboardInterrupt):  # as if killed: nothing is tidied up
        writer(lambda: fail(KeyboardInterrupt()))
    replaced = checkpoint.with_name("checkpoint-3.replaced")
    assert checkpoints.last_whole_checkpoint(checkpoint.parent) == replaced
    assert (replaced / "model.safetensors").read_bytes() == content
    writer(write_state)
    assert checkpoints.last_whole_checkpoint(checkpoint.parent) == checkpoint and not replaced.exists()


def test_nothing_is_deleted_before_it_is_whole_on_every_node(checkpoint, writer, monkeypatch):
    order = []
    monkeypatch.setattr(checkpoints, "_wait", lambda _: order.append("all ranks"))
    monkeypatch.setattr(checkpoints, "write_record", lambda *_: order.append("record"))
    monkeypatch.setattr(checkpoints, "rotate_checkpoints", lambda *_: order.append("delete"))
    writer(lambda: order.append("write"), limit=1)
    assert order == ["all ranks", "write", "all ranks", "record", "all ranks", "delete"]


def test_newest_without_its_schedule_is_passed_over_without_a_record_too(checkpoint, caplog):
    torch.save({}, checkpoint / "scheduler.pt")
    newer = checkpoint.with_name("checkpoint-6")
    shutil.copytree(checkpoint, newer)
    trainer = trainer_of(checkpoint.parent)
    trainer.model = linear()
    assert choose_checkpoint(trainer, True) == str(newer)
    (newer / "scheduler.pt").unlink()
    assert choose_checkpoint(trainer, True) == str(checkpoint)
    assert (
        "checkpoint-6` is passed over" in caplog.text and "scheduler.pt` is missing, so the optimizer" in caplog.text
    )
    assert "holds the random state of 0 processes" in caplog.text


@pytest.mark.parametrize("facts", [{"epoch_rows": "18"}, {"rows_per_optimizer_step": True}, {"split": 3}])
def test_facts_of_another_kind_are_a_sentence(checkpoint, facts):
    write(checkpoint, RUN_FILE, facts)
    with pytest.raises(ValueError, match="says `.*` .*, which no run writes: resume from another checkpoint"):
        check_rows(trainer_of(checkpoint.parent), checkpoint)

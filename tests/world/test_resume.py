"""A resumed run is the uninterrupted one: to the bit on the same processes, to rounding on others; or it is refused.

Tolerance 1e-6 relative, where another split sums in another order: three steps of AdamW in fp32.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import resource
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import transformers as tf
from transformers import Trainer, TrainerCallback

from hf_longctx import PackingCollator
from hf_longctx.proof.tiny import shrink
from hf_longctx.resilience.checkpoints import UNFINISHED, last_whole_checkpoint

from ..models import build
from ..training import Rows, Stream, reset_state, train
from .test_replicas import with_dropout


def hub_rows():
    return datasets.Dataset.from_list(Rows(48).rows).to_iterable_dataset()


BUDGET = {"data_collator": PackingCollator(max_tokens=48)}
DATA = {
    "rows": {"rows": Rows(16)},
    "stream": {"rows": Stream(Rows(48)), "accelerator_config": {"dispatch_batches": False}},
    "hub stream": {"rows": hub_rows(), "accelerator_config": {"dispatch_batches": False}},
    "packed rows": {"rows": Rows(44), "trainer_options": BUDGET},
    "packed stream": {"rows": Stream(Rows(80)), "trainer_options": BUDGET},
    "rows drawn twice": {"rows": Rows(4)},
    "packed rows drawn twice": {"rows": Rows(8), "trainer_options": BUDGET},
    "stream read twice": {"rows": Stream(Rows(7))},
    "packed stream read twice": {"rows": Stream(Rows(20)), "trainer_options": BUDGET},
}
FROM_START = [kind for kind in DATA if not kind.endswith("twice")]  # where it ends depends on the split
RUN = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_steps": 6}
SAVE = {"save_strategy": "steps", "save_steps": 3}


def run_here(size, options):
    try:
        return train(size, **options)
    finally:
        reset_state()


def refuse_here(size, options, own_folders=None):
    """The message that a resumed run is refused with, and how far it came."""
    seen = []
    if own_folders is not None:
        options = {**options, "resume": own_folders[torch.distributed.get_rank()]}
    try:
        train(size, **options, after=seen.append)
    except ValueError as error:
        return str(error)
    finally:
        reset_state()


def later_steps(history):
    return [
        (e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in history if "loss" in e and e["step"] > 3
    ]


# An older transformers cannot load moments in several processes on a CPU ("tagged with cpu:0"); GPUs are not
# concerned.
loads_moments = pytest.mark.skipif(
    'device.type != "cpu"' not in inspect.getsource(Trainer._load_optimizer_and_scheduler),
    reason="this transformers cannot load an optimizer's state in several processes on a CPU",
)


@loads_moments
@pytest.mark.parametrize("kind", [kind for kind in DATA if kind not in ("stream", "hub stream")])
def test_same_processes_go_on_bit_for_bit_with_dropout(world2, tmp_path, kind):
    run = {**RUN, **DATA[kind], "prepare": with_dropout, "output_dir": str(tmp_path), "per_device_train_batch_size": 2}
    whole = world2.run(run_here, 2, {**run, **SAVE})
    plain = world2.run(run_here, 2, {**run, "prepare": None})
    resumed = world2.run(run_here, 2, {**run, "resume": str(tmp_path / "checkpoint-3")})
    for before, after in zip(whole, resumed):
        assert len(later_steps(before[0])) == 3
        assert not kind.endswith("drawn twice") or before[2]["state"]["epoch"] > 2
        assert later_steps(after[0]) == later_steps(before[0])
        assert all(torch.equal(after[1][name], weight) for name, weight in before[1].items())
    assert later_steps(plain[0][0]) != later_steps(whole[0][0]), "dropout draws nothing"


@loads_moments
@pytest.mark.parametrize("kind", FROM_START)
def test_two_groups_go_on_as_one_group_of_two(world2, tmp_path, kind):
    """`dp = 2` to `P = 2` with the same rows in a step: twice the rows, or two accumulation steps."""
    run = {**RUN, **DATA[kind], "output_dir": str(tmp_path)}
    whole = world2.run(run_here, 1, {**run, **SAVE, "attention": "packed", "per_device_train_batch_size": 2})[0]
    splits = [{"per_device_train_batch_size": 4}]
    if kind == "rows":
        splits.append({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    for split in splits:
        for after in world2.run(run_here, 2, {**run, **split, "resume": str(tmp_path / "checkpoint-3")}):
            assert len(later_steps(after[0])) == 3
            for mine, other in zip(later_steps(after[0]), later_steps(whole[0])):
                assert mine == pytest.approx(other, rel=1e-6)
            for name, weight in whole[1].items():
                assert (after[1][name] - weight).abs().max() <= 1e-6 * weight.abs().max(), name


# Refused before the first step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoint-3 and checkpoint-6 of one process."""
    folder = tmp_path_factory.mktemp("saved")
    run_here(1, {**RUN, **SAVE, "output_dir": str(folder)})
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


CHANGED, LOST = "is not the file that was saved", "is missing, and was saved with this checkpoint"
DAMAGE = [
    ("model.safetensors", cut, "cut off or damaged"),
    ("model.safetensors", flip, CHANGED),
    ("optimizer.pt", cut, "is cut off or was not written by torch"),
    ("rng_state.pth", remove, LOST),
    ("trainer_state.json", cut, "cannot be read"),
    ("scheduler.pt", remove, LOST),
    (UNFINISHED, lambda path: path.touch(), "the run ended while this checkpoint was written"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_damaged_file_is_named_and_the_newest_whole_checkpoint_is_taken_instead(copied, name, damage, words, caplog):
    damage(copied / "checkpoint-6" / name)
    options = {**RUN, "output_dir": str(copied)}
    message = refuse_here(1, {**options, "resume": str(copied / "checkpoint-6")})
    assert f"`{copied / 'checkpoint-6' / name}`" in message and words in message
    assert last_whole_checkpoint(copied) == copied / "checkpoint-3"
    history, _, extra = run_here(1, {**options, "max_steps": 7, "resume": True})
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7]
    assert "is passed over" in caplog.text


def test_checkpoint_of_another_model_is_refused(copied):
    options = {**RUN, "output_dir": str(copied), "resume": str(copied / "checkpoint-6")}
    assert "describes a model of type 'llama', and this run trains 'mistral'" in refuse_here(
        1, {**options, "model": "mistral"}
    )

    def wider(_):

        return build("llama", "ulysses", intermediate_size=80)

    message = refuse_here(1, {**options, "prepare": wider})
    assert (
        "is of another model: `model.layers.0.mlp.down_proj.weight` has shape (48, 64) there and (48, 80)" in message
    )


def test_distributed_checkpoint_is_read_by_its_directory(tmp_path):
    """As accelerate writes it for FSDP2: the model's tensors under `model.`, the optimizer in a folder of its own."""
    from torch.distributed import checkpoint

    from hf_longctx.resilience.checkpoint_weights import check_weights

    model = build("llama", "sdpa")
    folder = tmp_path / "pytorch_model_fsdp_0"
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(ValueError, match="optimizer_0/.metadata` is missing"):
        check_weights(model, tmp_path, is_fsdp=True)
    checkpoint.save({"optimizer": {"step": torch.ones(3)}}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    check_weights(model, tmp_path, is_fsdp=True)
    with pytest.raises(ValueError, match="is of another model"):
        check_weights(build("llama", "sdpa", num_hidden_layers=3), tmp_path, is_fsdp=True)
    cut(next(folder.glob("*.distcp")))
    with pytest.raises(ValueError, match="fewer than its `.metadata` says"):
        check_weights(model, tmp_path, is_fsdp=True)


def save_fsdp2(folder):
    """Two ranks, as accelerate saves under FSDP2 with `SHARDED_STATE_DICT`; what the check makes of both folders."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    from hf_longctx.resilience.shard_metadata import check_shards

    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    states = {"pytorch_model_fsdp_0": {"model": get_model_state_dict(model)}}
    states["optimizer_0"] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    for name, state in states.items():
        checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(folder / name))
    return {name: len(check_shards(folder / name).state_dict_metadata) for name in states}


def test_shards_of_fsdp2_are_read_by_the_classes_that_are_allowed(world2, tmp_path):
    for found in world2.run(save_fsdp2, tmp_path):
        assert found["pytorch_model_fsdp_0"] == 4 and found["optimizer_0"] > 12


def test_adapter_and_whole_model_are_told_apart(copied, tmp_path):
    from .test_trainer import with_lora

    options = {**RUN, **SAVE, "prepare": with_lora, "output_dir": str(tmp_path / "lora")}
    whole = run_here(1, options)
    adapter = {**options, "resume": str(tmp_path / "lora" / "checkpoint-3")}
    assert later_steps(run_here(1, adapter)[0]) == later_steps(whole[0])
    assert "`" + str(copied / "checkpoint-6" / "adapter_model.safetensors") + "` is missing" in refuse_here(
        1, {**options, "resume": str(copied / "checkpoint-6")}
    )
    assert "model.safetensors` is missing, and the run trains a whole model" in refuse_here(
        1, {**adapter, "prepare": None}
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"per_device_train_batch_size": 4}, "rows_per_optimizer_step"),
        ({"seed": 6}, "seed"),
        ({"rows": Rows(17)}, "num_rows"),
    ],
)
def test_run_that_would_draw_other_rows_is_refused_unless_told_to_begin_them_anew(copied, change, name):
    options = {**RUN, **change, "output_dir": str(copied), "resume": str(copied / "checkpoint-3")}
    message = refuse_here(1, options)
    assert f"says `{name}` " in message
    assert "other rows would be drawn than by the run it continues" in message
    if name == "num_rows":
        assert refuse_here(1, {**options, "ignore_data_skip": True}) is None


def test_another_split_is_refused_where_the_last_step_of_an_epoch_depends_on_it(tmp_path):
    """Eighteen rows, four a step: two are left, which two groups fill up and two accumulation steps do not."""
    options = {**RUN, "rows": Rows(18), "output_dir": str(tmp_path)}
    run_here(1, {**options, **SAVE, "per_device_train_batch_size": 4})
    options = {**options, "resume": str(tmp_path / "checkpoint-3")}
    assert refuse_here(1, {**options, "per_device_train_batch_size": 4}) is None
    message = refuse_here(1, {**options, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    assert "an epoch has 18 rows, which steps of 4 do not divide" in message
    assert "Keep them at 4, 1, 1 (this run has 2, 1, 2)" in message


def test_collator_that_draws_random_numbers_is_told_on_resuming_and_others_are_not(tmp_path, caplog):
    from .test_trainer import masking_collator

    for collator, is_told in ((masking_collator, True), (None, False)):
        options = {**RUN, "output_dir": str(tmp_path / str(is_told)), "attention": "packed"}
        options |= {"trainer_options": {"data_collator": collator}} if collator else {}
        run_here(1, {**options, **SAVE})
        caplog.clear()
        run_here(1, {**options, "resume": str(tmp_path / str(is_told) / "checkpoint-3")})
        assert ("draws random numbers: training goes on with the same rows" in caplog.text) == is_told


def test_all_ranks_refuse_what_one_of_them_sees(world2, copied):
    cut(copied / "checkpoint-6" / "optimizer.pt")
    folders = [str(copied / "checkpoint-3"), str(copied / "checkpoint-6")]
    options = {**RUN, "output_dir": str(copied), "per_device_train_batch_size": 2}
    first, second = world2.run(refuse_here, 2, options, folders)
    assert first == second and first.endswith("(seen by rank 1)") and "optimizer.pt`" in first


# A disk that is full


@pytest.mark.parametrize("fits", ["nothing", "the weights"])
def test_full_disk_leaves_the_last_whole_checkpoint_and_says_so(copied, fits):
    """The system itself refuses to write more than so many bytes into a file."""
    sizes = {name: (copied / "checkpoint-3" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")}
    limit = 20_000 if fits == "nothing" else (sizes["model.safetensors"] + sizes["optimizer.pt"]) // 2
    assert limit < sizes["optimizer.pt"] and (fits == "nothing") == (limit < sizes["model.safetensors"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RuntimeError) as error:
            run_here(1, {**RUN, **SAVE, "max_steps": 9, "output_dir": str(copied), "resume": True})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"`{copied / 'checkpoint-9'}` could not be written by rank 0" in str(error.value)
    assert f"The last whole checkpoint is `{copied / 'checkpoint-6'}`" in str(error.value)
    assert not (copied / "checkpoint-9").exists()


# `save_total_limit`


def names_in(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_run_that_dies_before_a_checkpoint_is_whole_leaves_the_one_before(tmp_path, monkeypatch):
    """The process ends where it would take the mark away: nothing older may have been deleted."""
    unlink = Path.unlink

    def die(path, *args, **kwargs):
        if path.parent.name == "checkpoint-6":
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", die)
    with pytest.raises(KeyboardInterrupt):
        run_here(1, {**RUN, **SAVE, "save_total_limit": 1, "output_dir": str(tmp_path)})
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_two_ranks_keep_so_many_checkpoints_by_step_and_record_the_files_of_both(world2, tmp_path):
    options = {**RUN, **SAVE, "save_total_limit": 1, "output_dir": str(tmp_path), "per_device_train_batch_size": 2}
    world2.run(run_here, 2, options)
    assert names_in(tmp_path) == ["checkpoint-6"]
    record = json.loads((tmp_path / "checkpoint-6" / "hf_longctx.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "trainer_state.json"} <= set(record)
    arguments = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert arguments.save_total_limit == 1, "what holds deletion back is written down as the user's"
    (tmp_path / "checkpoint-6" / "rng_state_1.pth").unlink()
    first, second = world2.run(refuse_here, 2, {**options, "resume": True})
    assert first == second and "holds no whole checkpoint" in first and "rng_state_1.pth` is missing" in first


def test_the_best_and_the_last_checkpoint_are_both_there_at_the_end(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    best |= {"eval_strategy": "steps", "eval_steps": 3, "trainer_options": {"eval_dataset": Rows(4)}}
    run_here(1, {**RUN, **SAVE, **best, "max_steps": 9, "save_total_limit": 1, "output_dir": str(tmp_path)})
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-9"]  # the loss falls
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_a_best_checkpoint_that_is_damaged_is_not_loaded(tmp_path):
    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                flip(tmp_path / "checkpoint-3" / "model.safetensors")

    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    best |= {"eval_strategy": "steps", "eval_steps": 3}
    best["trainer_options"] = {"eval_dataset": Rows(4), "callbacks": [Damage()]}
    message = refuse_here(1, {**RUN, **SAVE, **best, "output_dir": str(tmp_path)})
    assert message is not None and "checkpoint-3/model.safetensors` is not the file that was saved" in message


def test_a_checkpoint_is_uploaded_once_it_is_whole(tmp_path, monkeypatch):
    class Push(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.push_to_hub = True

    seen = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda _, folder: seen.append(set(os.listdir(folder))))
    run_here(1, {**RUN, **SAVE, "output_dir": str(tmp_path), "trainer_options": {"callbacks": [Push()]}})
    assert len(seen) == 2 and all(UNFINISHED not in names and "hf_longctx.json" in names for names in seen)


def test_what_an_earlier_attempt_left_is_not_taken_for_a_part(copied):
    """Killed with two processes while it wrote checkpoint-6, then resumed with one."""
    (copied / "checkpoint-6" / UNFINISHED).touch()
    (copied / "checkpoint-6" / "rng_state_1.pth").touch()
    run_here(1, {**RUN, **SAVE, "output_dir": str(copied), "resume": True})
    assert last_whole_checkpoint(copied) == copied / "checkpoint-6"
    assert not (copied / "checkpoint-6" / "rng_state_1.pth").exists()


def test_a_checkpoint_of_the_stock_trainer_resumes(tmp_path):
    options = {**RUN, "output_dir": str(tmp_path)}
    whole = run_here(0, {**options, **SAVE})
    assert not (tmp_path / "checkpoint-3" / "hf_longctx.json").exists()
    resumed = run_here(1, {**options, "attention": "sdpa", "resume": str(tmp_path / "checkpoint-3")})
    assert later_steps(resumed[0]) == later_steps(whole[0])


def test_whole_checkpoint_carries_no_mark_and_says_what_run_it_is_of(saved):
    assert not (saved / "checkpoint-3" / UNFINISHED).exists()
    facts = json.loads((saved / "checkpoint-3" / "hf_longctx.json").read_text())
    assert (facts["world_size"], facts["rows_per_optimizer_step"], facts["num_rows"]) == (1, 2, 16)


@pytest.mark.parametrize("best", [False, True])
def test_stacked_experts_are_loaded(best, tmp_path):
    # transformers saves each expert by itself, and its trainer looks for the stacked ones.
    config = shrink(tf.AutoConfig.for_model("mixtral"))
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    options = {**RUN, **SAVE, "rows": Rows(16)}
    if best:
        options |= {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
        options["trainer_options"] = {"eval_dataset": Rows(4)}
    options["output_dir"] = str(tmp_path)
    history, weights, _ = run_here(1, {**options, "model": copy.deepcopy(model)})
    again, same, _ = run_here(1, {**options, "model": model, "resume": str(tmp_path / "checkpoint-3")})
    assert later_steps(again) == later_steps(history)
    assert all(torch.equal(same[key], weights[key]) for key in weights)
    if best:
        kept = (type(model).from_pretrained(tmp_path / f"checkpoint-{step}").state_dict() for step in (3, 6))
        assert any(all(torch.equal(weights[key], state[key]) for key in weights) for state in kept)

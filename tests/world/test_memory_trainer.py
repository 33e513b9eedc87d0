"""Every memory preset trains like the stock trainer: same losses, gradient norms and weights."""

from __future__ import annotations

import functools
import logging
import tempfile

import pytest
import torch
from trl import SFTConfig

from hf_longctx import LongContextConfig, MemoryConfig, PackingCollator
from hf_longctx.config.memory import MEMORY_PRESETS
from hf_longctx.planner import memory_plan
from hf_longctx.planner.memory_plan import Planner
from hf_longctx.planner.presets import PRESETS
from hf_longctx.planner.settings import Settings
from hf_longctx.reporting import planned_memory
from hf_longctx.reporting.report import RunReport
from hf_longctx.trainer import memory_presets

from ..models import build, config_of
from ..training import Rows, arguments, assert_same_trajectory, train
from .test_sft import fit


TILES = {"loss_tile_size": 7, "mlp_tile_size": 5}
MIB = 2**20


def run_here(size, options):
    return train(size, **options)


@functools.cache
def stock(model="llama", attention=None, rows=2, steps=1):
    """The reference: transformers' own trainer on one process."""
    options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
    return train(0, model=model, attention=attention, **options)


def test_config_and_ladder_have_the_same_names():
    assert MEMORY_PRESETS == (*PRESETS, "auto")


RUNGS = [TILES, *({"memory": preset} for preset in ("loss", "mlp", "checkpoint", "max"))]


@pytest.mark.parametrize(
    ("name", "memory"), [*(("llama", memory) for memory in RUNGS), ("gemma2", TILES), ("mistral", TILES)]
)
def test_rungs_train_alike_on_one_process(name, memory):
    expected = stock(name, "eager" if name == "gemma2" else None)
    assert_same_trajectory(train(1, model=name, attention="packed", memory=memory), expected, 3e-5)


@pytest.mark.parametrize(
    ("world_size", "size", "memory"), [(2, 2, TILES), (2, 1, TILES), (4, 2, TILES), (2, 2, {"memory": "max"})]
)
def test_rungs_train_alike_on_several(worlds, world_size, size, memory):
    expected = stock(rows=2 * world_size // size, steps=2)
    options = {"gradient_accumulation_steps": 2, "memory": memory}
    for rank, actual in enumerate(worlds(world_size).run(run_here, size, options)):
        assert_same_trajectory(actual, expected)
        assert ("planned_memory_gib" in actual[0][-1]) == (rank == 0 and "memory" in memory)


def test_stock_attention_can_be_tiled_too():
    assert_same_trajectory(train(1, attention="sdpa", memory=TILES), stock())


def test_packed_rows_with_tiles_train_like_padded_ones():
    flat = {"data_collator": PackingCollator()}
    assert_same_trajectory(train(1, attention="packed", trainer_options=flat, memory=TILES), stock())


def test_evaluation_is_tiled_as_well():
    options = {"trainer_options": {"eval_dataset": Rows(7)}, "after": "evaluate"}
    expected = train(1, attention="packed", **options)
    actual = train(1, attention="packed", memory=TILES, **options)
    assert actual[2]["after"]["eval_loss"] == pytest.approx(expected[2]["after"]["eval_loss"], rel=1e-6)


def test_sft_keeps_its_own_tiles_and_gets_ours_for_its_mlps():
    memory = {"memory": "max"}
    assert_same_trajectory(fit(1, attention="packed", memory=memory), fit(0), 2e-5)
    with pytest.raises(NotImplementedError, match="`SFTTrainer` computes it in tiles of its own already"):
        fit(1, attention="packed", memory={"loss_tile_size": 64})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer_options": {"compute_loss_func": lambda outputs, labels, num_items_in_batch: 0}}, "need the logits"),
        ({"label_smoothing_factor": 0.1}, "need the logits"),
        ({"trainer_options": {"compute_metrics": lambda _: {}}}, "`compute_metrics` needs the logits"),
    ],
)
def test_loss_that_needs_logits_beside_tiles_is_refused(options, message):
    with pytest.raises(NotImplementedError, match=message):
        train(1, attention="packed", memory={"loss_tile_size": 7}, **options)


def test_preset_leaves_a_loss_that_needs_logits_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        train(1, attention="packed", memory={"memory": "loss"}, label_smoothing_factor=0.1)
    assert "leaves the loss as it is" in caplog.text


def test_mixture_of_experts_is_left_whole_by_a_preset_and_refused_by_name(caplog):
    with caplog.at_level(logging.WARNING):
        train(1, model="gpt_oss", attention="packed", memory={"memory": "mlp"})
    assert "leaves the MLPs whole" in caplog.text
    with pytest.raises(NotImplementedError, match="GptOss"):
        train(1, model="gpt_oss", attention="packed", memory={"mlp_tile_size": 5})


# The planner decides


@pytest.fixture(scope="module")
def planner():
    return Planner(build("llama", "packed", vocab_size=8192).config)


@pytest.fixture
def one_planner(planner, monkeypatch):
    """The runs of this file are planned by one planner, which keeps its simulations."""
    monkeypatch.setattr(memory_plan, "Planner", lambda config: planner)


def chosen(monkeypatch, device_bytes: int, tokens: int | None = 65_536, collator=None) -> str:
    monkeypatch.setattr(memory_presets, "_device_bytes", lambda _: device_bytes)
    config = MemoryConfig(memory="auto", planned_tokens=tokens)
    # A loss tile of few words holds very many tokens, and as many are simulated.
    model = build("llama", "packed", vocab_size=8192)
    return memory_presets.prepare_memory(
        config, LongContextConfig(), arguments(tempfile.mkdtemp()), model, collator
    ).name


def test_auto_takes_the_first_rung_that_fits(one_planner, monkeypatch):
    # Planned: 12.7, 1.02, 0.77, 0.41 and 0.36 GiB from preset to preset, of 92 % of the device.
    assert [chosen(monkeypatch, gib * 2**30) for gib in (64.0, 0.9, 0.46)] == ["off", "mlp", "checkpoint"]


def test_auto_reads_lengths_from_the_collator(one_planner, monkeypatch):
    assert chosen(monkeypatch, 64 * 2**30, None, PackingCollator(max_tokens=48)) == "off"


def test_auto_without_a_length_is_refused():
    with pytest.raises(ValueError, match="does not know how long rows are: set `planned_tokens`"):
        train(1, attention="packed", memory={"memory": "auto"})


def test_auto_refuses_what_no_rung_can_hold(one_planner, monkeypatch):
    with pytest.raises(ValueError, match="longest that the plan has room for are"):
        chosen(monkeypatch, 2**26, 2**20)


def test_auto_needs_a_loaded_model():
    config = MemoryConfig(memory="auto", planned_tokens=64)
    with pytest.raises(ValueError, match="`model` is 'org/name': load it with `from_pretrained`"):
        memory_presets.prepare_memory(config, LongContextConfig(), arguments(tempfile.mkdtemp()), "org/name", None)


@pytest.mark.parametrize("preset", ["max", "auto"])
def test_offload_that_the_host_has_no_memory_for_is_refused(one_planner, monkeypatch, preset):
    args, tokens = arguments(tempfile.mkdtemp()), 2**16
    monkeypatch.setattr(type(args), "device", torch.device("cuda"))
    monkeypatch.setattr(memory_presets, "_device_bytes", lambda _: int(0.42 * 2**30))
    config = MemoryConfig(memory=preset, planned_tokens=tokens)
    model = build("llama", "packed", vocab_size=8192)
    needed = 2 * 2**25  # a tensor of two rows has 25.2 MB, and pinned memory comes in powers of two
    monkeypatch.setattr(memory_presets, "free_bytes", lambda _: needed)
    assert memory_presets.prepare_memory(config, LongContextConfig(), args, model, None).name == "max"
    assert args.gradient_checkpointing_kwargs["offload"]
    monkeypatch.setattr(memory_presets, "free_bytes", lambda _: needed - 1)
    with pytest.raises(ValueError, match="0.06 GiB of checkpoints in the CPU memory of this node for rows of 65,536"):
        memory_presets.prepare_memory(config, LongContextConfig(), args, model, None)


def test_checkpointing_that_the_user_set_keeps_its_settings():
    args = SFTConfig(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    memory_presets.prepare_memory(MemoryConfig(memory="max"), LongContextConfig(), args, None, None)
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True, "offload": False}


# Planned beside measured


def test_plan_of_the_longest_batch_stands_beside_what_the_run_took(monkeypatch, tmp_path):
    model, report = build("llama", "packed"), RunReport()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    readings = iter((100 * MIB, 180 * MIB))  # when training begins, and when it ends
    monkeypatch.setattr(planned_memory, "peak_memory", lambda: next(readings))
    monkeypatch.setattr(planned_memory, "cpu_memory", lambda: 180 * MIB)
    monkeypatch.setattr(planned_memory, "resident_bytes", lambda: 90 * MIB)
    options = {"trainer_options": {"callbacks": [report]}, "output_dir": str(tmp_path)}
    history, *_ = train(1, model=model, memory={"memory": "checkpoint"}, **options)
    settings = Settings(tokens=21, rows=2, compute_dtype=torch.float32, optimizer="sgd", on_gpu=False)
    planner = Planner(config_of("llama"))
    expected = planner.breakdown(planner.preset("checkpoint", settings)).device
    measured = 180 * MIB - (90 * MIB - weights)
    assert history[-1]["planned_memory_gib"] == pytest.approx(expected / 2**30, rel=1e-3)  # four digits
    assert history[-1]["measured_memory_gib"] == pytest.approx(measured / 2**30, rel=1e-3)
    assert history[-1]["planned_over_measured"] == pytest.approx(expected / measured, rel=1e-3)
    assert report.metrics["train"]["planned_memory_gib"] == history[-1]["planned_memory_gib"]
    assert "| Planned memory of a process |" in (tmp_path / "README.md").read_text()


def test_nothing_is_measured_where_more_was_taken_before_the_run(monkeypatch):
    monkeypatch.setattr(planned_memory, "peak_memory", lambda: 100 * MIB)
    history, *_ = train(1, attention="packed", memory={"memory": "loss"}, max_steps=1)
    assert "planned_memory_gib" in history[-1] and "measured_memory_gib" not in history[-1]


def test_run_ends_well_without_a_plan(monkeypatch, caplog):
    monkeypatch.setattr(memory_plan, "simulate", _fail)
    with caplog.at_level(logging.WARNING):
        history, *_ = train(1, attention="packed", memory={"memory": "loss"}, max_steps=1)
    assert "train_runtime" in history[-1] and "planned_memory_gib" not in history[-1]
    assert "was not planned: KeyError: 'no such layer'" in caplog.text


def _fail(*arguments):
    raise KeyError("no such layer")

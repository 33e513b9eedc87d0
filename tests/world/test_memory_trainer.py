"""Every rung of the memory ladder trains like the stock trainer: same losses, gradient norms and weights."""

from __future__ import annotations

import logging

import pytest
from trl import SFTConfig

from hf_longctx import LongContextConfig, PackingCollator
from hf_longctx.config import MEMORY_PRESETS
from hf_longctx.memory.presets import PRESETS
from hf_longctx.trainer import memory

from ..training import Rows, assert_same_trajectory, train
from .test_sft import fit


TILES = {"loss_tile_size": 7, "mlp_tile_size": 5}


def run_here(size, options):
    return train(size, **options)


def test_config_and_ladder_have_the_same_names():
    assert MEMORY_PRESETS == (*PRESETS, "auto")


RUNGS = [TILES, *({"memory": preset} for preset in ("loss", "mlp", "checkpoint", "max"))]


@pytest.mark.parametrize(
    ("name", "context"), [*(("llama", context) for context in RUNGS), ("gemma2", TILES), ("mistral", TILES)]
)
def test_rungs_train_alike_on_one_process(name, context):
    expected = train(0, model=name, attention="eager" if name == "gemma2" else None)
    assert_same_trajectory(train(1, model=name, attention="packed", context=context), expected, 3e-5)


@pytest.mark.parametrize(
    ("world_size", "size", "context"), [(2, 2, TILES), (2, 1, TILES), (4, 2, TILES), (2, 2, {"memory": "max"})]
)
def test_rungs_train_alike_on_several(worlds, world_size, size, context):
    options = {"gradient_accumulation_steps": 2}
    expected = train(0, per_device_train_batch_size=2 * world_size // size, **options)
    for actual in worlds(world_size).run(run_here, size, {**options, "context": context}):
        assert_same_trajectory(actual, expected)


def test_stock_attention_can_be_tiled_too():
    assert_same_trajectory(train(1, attention="sdpa", context=TILES), train(0))


def test_packed_rows_with_tiles_train_like_padded_ones():
    flat = {"data_collator": PackingCollator()}
    assert_same_trajectory(train(1, attention="packed", trainer_options=flat, context=TILES), train(0))


def test_evaluation_is_tiled_as_well():
    options = {"trainer_options": {"eval_dataset": Rows(7)}, "after": "evaluate"}
    expected = train(1, attention="packed", **options)
    actual = train(1, attention="packed", context=TILES, **options)
    assert actual[2]["after"]["eval_loss"] == pytest.approx(expected[2]["after"]["eval_loss"], rel=1e-6)


def test_sft_keeps_its_own_tiles_and_gets_ours_for_its_mlps():
    context = {"memory": "max"}
    assert_same_trajectory(fit(1, attention="packed", context=context), fit(0), 2e-5)
    with pytest.raises(NotImplementedError, match="`SFTTrainer` computes it in tiles of its own already"):
        fit(1, attention="packed", context={"loss_tile_size": 64})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"trainer_options": {"compute_loss_func": lambda outputs, labels, num_items_in_batch: 0}}, "need the logits"),
        ({"label_smoothing_factor": 0.1}, "need the logits"),
        ({"trainer_options": {"compute_metrics": lambda _: {}}}, "`compute_metrics` needs the logits"),
    ],
)
def test_loss_that_needs_logits_beside_tiles_is_refused(options, sentence):
    with pytest.raises(NotImplementedError, match=sentence):
        train(1, attention="packed", context={"loss_tile_size": 7}, **options)


def test_preset_leaves_a_loss_that_needs_logits_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        train(1, attention="packed", context={"memory": "loss"}, label_smoothing_factor=0.1)
    assert "leaves the loss as it is" in caplog.text


def test_mixture_of_experts_is_left_whole_by_a_preset_and_refused_by_name(caplog):
    with caplog.at_level(logging.WARNING):
        train(1, model="gpt_oss", attention="packed", context={"memory": "mlp"})
    assert "leaves the MLPs whole" in caplog.text
    with pytest.raises(NotImplementedError, match="GptOss"):
        train(1, model="gpt_oss", attention="packed", context={"mlp_tile_size": 5})


# The planner decides


def chosen(monkeypatch, device_bytes: int, tokens: int | None = 65_536, **options) -> str:
    monkeypatch.setattr(memory, "_device_bytes", lambda _: device_bytes)
    seen = []
    original = memory.prepare_memory

    def watch(*arguments):
        seen.append(original(*arguments).name)
        return memory.PRESETS["off"]

    monkeypatch.setattr("hf_longctx.trainer.mixin.prepare_memory", watch)
    context = {"memory": "auto", "planned_tokens": tokens}
    train(1, attention="packed", context=context, max_steps=1, **options)
    return seen[0]


def test_auto_takes_the_first_rung_that_fits(monkeypatch):
    rungs = [chosen(monkeypatch, gib * 2**30) for gib in (64.0, 0.75, 0.345)]
    order = [list(PRESETS).index(rung) for rung in rungs]
    assert order[0] == 0 and order == sorted(order) and order[-1] > 0, rungs


def test_auto_reads_lengths_from_the_collator(monkeypatch):
    packed = {"trainer_options": {"data_collator": PackingCollator(max_tokens=48)}}
    assert chosen(monkeypatch, 64 * 2**30, None, **packed) == "off"


def test_auto_without_a_length_is_refused():
    with pytest.raises(ValueError, match="does not know how long rows are: set `planned_tokens`"):
        train(1, attention="packed", context={"memory": "auto"})


def test_auto_refuses_what_no_rung_can_hold(monkeypatch):
    with pytest.raises(ValueError, match="longest that the plan has room for are"):
        chosen(monkeypatch, 2**26, 2**30)


def test_checkpointing_that_the_user_set_keeps_its_settings():
    args = SFTConfig("unused", use_cpu=True, bf16=False, gradient_checkpointing_kwargs={"use_reentrant": True})
    memory.prepare_memory(LongContextConfig(memory="max"), args, None, None)
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True, "offload": False}

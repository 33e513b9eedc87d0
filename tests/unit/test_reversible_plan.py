"""Plans of reversible layers: near what a step takes, flat in depth, and what the command says."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_longctx import cli, make_reversible
from hf_longctx.cli import plan_search, plan_sizes
from hf_longctx.cli.answer import Answer
from hf_longctx.planner.memory_plan import USABLE_SHARE, Planner
from hf_longctx.planner.reversible_plan import deepest_stack
from hf_longctx.planner.settings import Settings
from hf_longctx.planner.simulate import run_step
from hf_longctx.planner.tracker import StorageTracker


SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(**SHAPE, num_hidden_layers=layers, attn_implementation="sdpa")


def test_the_plan_is_near_what_a_step_takes():
    settings = Settings(tokens=2048, compute_dtype=torch.float32, optimizer="sgd", on_gpu=False, reversible=True)
    model = AutoModelForCausalLM.from_config(config(6)).train()
    make_reversible(model)
    ids = torch.randint(0, 128, (1, 2048))
    with torch.random.fork_rng():
        peaks = run_step(model, {"input_ids": ids, "labels": ids}, settings, StorageTracker())
    measured = max(sum(kinds.values()) for kinds in peaks.device.values())
    assert Planner(config(6)).breakdown(settings).device == pytest.approx(measured, rel=0.15)


def test_activations_do_not_grow_with_depth_and_the_deepest_model_fits():
    settings = Settings(tokens=2**14, reversible=True)
    few, more = (Planner(config(layers)).breakdown(settings) for layers in (3, 9))
    assert few.hidden == more.hidden and few.attention == more.attention and few.mlp == more.mlp
    budget = int(more.device / USABLE_SHARE) + 1
    found = deepest_stack(config(4), 64, settings, budget)
    assert found.num_layers == 9 and found.device == pytest.approx(more.device, rel=0.01)
    sharing = Settings(tokens=2**15, sequence_parallel_size=2, world_size=2, wrapper="fsdp2", reversible=True)
    assert Planner(config(3)).breakdown(sharing).workspace > few.workspace  # weights stay gathered


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="`reversible` layers keep nothing that `checkpointing` could free"):
        Settings(tokens=8, reversible=True, checkpointing=True)


def test_the_command_says_which_sizes_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan_sizes, "_WIDTHS", (64, 256))
    answer, settings = Answer(argparse.Namespace(command="plan", json=None)), Settings(tokens=1024, reversible=True)
    answer.console.width = 200
    plan_sizes.print_sizes(answer, config(4), settings, 2**24)
    text = capsys.readouterr().out
    assert [found["width"] for found in answer.facts["reversible_sizes"]] == [64]
    assert "width 64: up to" in text and "width 256: none, one layer takes" in text
    assert [preset.name for preset in plan_search._presets(settings)] == ["off", "loss", "mlp"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE}))
    assert cli.main(["plan", str(tmp_path), "--reversible", "--write", str(tmp_path / "run.yaml")]) == 2
    assert "`reversible_layers: true` into a file for" in capsys.readouterr().out.replace("\n", " ")

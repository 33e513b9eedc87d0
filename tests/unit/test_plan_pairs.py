"""Plans of steps on preference pairs: two rows a pair, which every rank holds whole, and a reference model."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_longctx import cli
from hf_longctx.cli import plan_search
from hf_longctx.planner.fake_model import add_adapters, find_stack, model_on_meta
from hf_longctx.planner.layer_watch import watch_layers
from hf_longctx.planner.memory_plan import Planner
from hf_longctx.planner.presets import PRESETS
from hf_longctx.planner.reference_forward import prepare_reference
from hf_longctx.planner.settings import Settings
from hf_longctx.planner.simulate import prepare, run_step, simulate
from hf_longctx.planner.tracker import StorageTracker

from ..models import VOCAB, config_of


TOKENS = 96
PAIRS = {"rows": 2, "whole_rows": True, "compute_dtype": torch.float32, "on_gpu": False}
CONFIG = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=32_000,
)


def real_step(settings: Settings):
    """A step with a reference on real tensors, watched by the same tracker."""
    load = lambda: AutoModelForCausalLM.from_config(config_of("llama"), attn_implementation="packed")
    model, tracker = load(), StorageTracker()
    stack = find_stack(model)
    if settings.optimizer == "lora":
        add_adapters(model, stack, settings.lora_rank)
    prepare(model, settings, tracker)
    watch_layers(model, stack, tracker)
    reference = model
    if settings.reference == "model":
        reference = prepare_reference(load().eval(), settings, stack, tracker)
    ids = torch.randint(VOCAB, (settings.rows, settings.tokens))
    batch = {name: ids.clone() for name in ("input_ids", "labels", "shift_labels")}
    batch = {**batch, "use_cache": False, "num_items_in_batch": 1}
    return run_step(model, batch, settings, tracker, reference)


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": "model", "loss_tile_size": TOKENS, "mlp_tile_size": 32},
        {"reference": "model", "checkpointing": True, "compute_dtype": torch.bfloat16},
        {"reference": "adapter", "optimizer": "lora", "loss_tile_size": TOKENS},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_simulation_holds_what_a_real_step_with_a_reference_holds(changes):
    settings = Settings(**{"tokens": TOKENS, **PAIRS, **changes})
    model = model_on_meta(config_of("llama"))
    planned, real = (
        {phase: round(sum(kinds.values())) for phase, kinds in peaks.device.items()}
        for peaks in (simulate(model, settings, find_stack(model), 2), real_step(settings))
    )
    assert planned.keys() == real.keys()
    if settings.reference == "model":
        assert {phase for phase, _ in planned if phase.startswith("reference")} == {"reference 0", "reference -1"}
    positions = 8 * TOKENS * settings.rows  # transformers keeps them under a trace, of both models
    assert {planned[phase] - real[phase] for phase in real} <= {step * positions for step in (-2, -1, 0, 1, 2)}


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(CONFIG)


def planned(planner: Planner, preset: str = "off", **changes):
    return planner.breakdown(planner.preset(preset, Settings(**{"tokens": 65_536, **PAIRS, **changes})))


def test_a_reference_has_weights_and_neither_gradients_nor_states(planner):
    two, one = (planned(planner, reference=kind, accumulates=True) for kind in ("model", "none"))
    assert two.weights == 2 * one.weights
    assert (two.gradients, two.optimizer) == (one.gradients, one.optimizer)
    # Its forward runs where all activations of the policy are kept, so it costs more than its weights.
    assert two.phase.startswith("reference") and two.device > one.device + one.weights
    split = planned(planner, reference="model", accumulates=True, world_size=4, wrapper="fsdp2")
    assert split.weights == pytest.approx(two.weights / 4, rel=0.01)


def test_a_reference_under_fsdp2_is_gathered_as_one_unit(planner):
    """A short row, in which that is more than the activations: two copies in bf16 next to what is sharded."""
    sharded = {"tokens": 64, "compute_dtype": torch.bfloat16, "world_size": 8, "wrapper": "fsdp2"}
    two, one = (planned(planner, reference=kind, **sharded) for kind in ("model", "none"))
    numel = sum(p.numel() for p in planner.model.parameters())
    assert two.phase.startswith("reference") and two.workspace >= 2 * 2 * numel > one.workspace


def test_rows_are_doubled_and_their_numbers_are_there_on_every_rank(planner):
    pair, long = planned(planner, rows=2), planned(planner, rows=1, tokens=2 * 65_536)
    assert pair.device == pytest.approx(long.device, rel=0.01)  # whose rotary table is twice as long
    shared = {"sequence_parallel_size": 4, "world_size": 4, "wrapper": "ddp"}
    whole, share = (planned(planner, "loss", whole_rows=whole, **shared) for whole in (True, False))
    assert whole.device - share.device == 2 * 65_536 * 80


def test_losses_of_pairs_run_in_tiles_under_every_preset(planner):
    tiled = planner.preset("loss", Settings(tokens=1024, **PAIRS))
    assert planner.preset("off", Settings(tokens=1024, **PAIRS)) == tiled and tiled.loss_tile_size


def test_an_adapter_is_its_own_reference(planner):
    lora, alone = (planned(planner, optimizer="lora", reference=kind) for kind in ("adapter", "none"))
    assert lora.weights == alone.weights and lora.device >= alone.device
    with pytest.raises(ValueError, match=r"`reference` \('adapter'\) switches the adapters of `optimizer` 'lora' off"):
        Settings(tokens=1, reference="adapter")
    with pytest.raises(ValueError, match=r"`reference` \('policy'\) must be one of none, model, adapter"):
        Settings(tokens=1, reference="policy")


def test_a_reward_model_has_one_model_and_no_vocabulary_to_predict():
    rewards, words = (Planner(CONFIG, scores_rows=scores) for scores in (True, False))
    numel = [sum(p.numel() for p in planner.model.parameters()) for planner in (rewards, words)]
    assert numel[1] - numel[0] == (CONFIG.vocab_size - 1) * CONFIG.hidden_size
    found = planned(rewards, preset="off")
    assert found.weights >= 4 * numel[0] and found.logits < 2**22 and rewards.tiles_loss is False


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 1}).save_pretrained(path)
    return path


def test_plan_of_pairs_prints_the_reference_and_writes_the_run(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan_search, "PRESETS", {name: PRESETS[name] for name in ("off", "loss")})
    recipe = tmp_path / "run.yaml"
    command = ["plan", str(folder), "--gpu_memory", "2", "--task", "dpo"]
    assert cli.main([*command, "--target_tokens", "16K", "--write", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "a reference model without gradients and optimizer" in printed and "of one pair" in printed
    assert " loss " not in printed  # a preset that changes nothing here
    written = yaml.safe_load(recipe.read_text())
    assert written["per_device_train_batch_size"] == 1 and "precompute_ref_log_probs" not in written
    assert written["dataset_name"] == "pairs.jsonl" and "hf-longctx dpo --config" in recipe.read_text()
    ahead = tmp_path / "ahead.yaml"
    assert cli.main([*command, "--precompute_ref_log_probs", "--target_tokens", "16K", "--write", str(ahead)]) == 0
    assert "no reference model" in capsys.readouterr().out
    assert yaml.safe_load(ahead.read_text())["precompute_ref_log_probs"] is True
    assert cli.main([*command[:-1], "reward", "--target_tokens", "16K"]) == 0
    assert "reward: two rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "grpo"], "`--task` (grpo) must be one of sft, dpo, reward"),
        (["--precompute_ref_log_probs"], "leaves out the reference model of DPO, and `--task` is sft"),
        (["--task", "dpo", "--reversible"], "`--reversible` layers are not trained on pairs, and `--task` is dpo"),
    ],
)
def test_plan_refuses_with_the_sentence(folder, capsys, arguments, message):
    assert cli.main(["plan", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().out

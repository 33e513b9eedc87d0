"""LSH attention from the command line: both recipes, `check` and `plan`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_longctx.cli import main, plan_search
from hf_longctx.config.lsh_settings import LSH_KEY, LSHConfig
from hf_longctx.planner.memory_plan import Planner
from hf_longctx.planner.settings import Settings
from hf_longctx.tasks import lsh_duplication, lsh_pretrain


ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def test_the_duplication_task_trains_and_runs_with_every_attention(tmp_path):
    words = "--row_tokens 16 --num_symbols 4 --window 4 --steps 2 --every 1 --width 32 --num_eval_rows 16"
    words += " --trained full window --seeds 0 3"
    lsh_duplication.main([*words.split(), "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / lsh_duplication.NUMBERS_FILE).read_text())["found"]
    assert [(row["trained"], row["seed"]) for row in found] == [(n, s) for n in ("full", "window") for s in (0, 3)]
    assert all(0 <= row[run] <= 1 for row in found for run in lsh_duplication.RUN)
    lines = (tmp_path / lsh_duplication.TABLE_FILE).read_text().splitlines()
    assert len(lines) == 4 and lines[2].startswith("| full | 2, 2 | ")
    mean = (found[2]["LSH-8"] + found[3]["LSH-8"]) / 2
    assert lines[3].startswith("| window | 2, 2 | ") and lines[3].split(" | ")[3] == f"{mean:.3f}"
    with pytest.raises(ValueError, match="`trained` .LSH-3. must be of full, LSH-8"):
        lsh_duplication.DuplicationArguments(trained=["LSH-3"])
    with pytest.raises(ValueError, match="`row_tokens` .5. must be even"):
        lsh_duplication.DuplicationArguments(row_tokens=5)
    with pytest.raises(ValueError, match="`init_std` .0.0. must be above 0"):
        lsh_duplication.DuplicationArguments(init_std=0.0)
    toy = lsh_duplication.DuplicationArguments()
    weights = lsh_duplication.build(toy, 0).bert.encoder.layer[0].attention.self.query.weight
    assert 0.09 < weights.std() < 0.11  # at 0.02 some of these models do not solve the task
    assert toy.attention("causal LSH-2") == LSHConfig(num_hashes=2, num_buckets=8, window=16)
    assert toy.attention("full") == LSHConfig(num_hashes=1, num_buckets=1, window=64)


def test_the_recipe_from_scratch_writes_its_settings(tmp_path, monkeypatch):
    config = str(ROOT / "recipes" / "lsh_pretrain_stdlib.yaml")
    small = "--max_steps 2 --row_tokens 48 --eval_rows 1 --width 16 --layers 1 --heads 2 --num_hashes 2 --threads 1"
    out = ["--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", ["lsh_pretrain.py", "--config", config, *small.split(), *out])
    lsh_pretrain.main()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="lsh")
    assert LSHConfig.of_model(loaded.config) == LSHConfig(num_hashes=2)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--width", "10", "--heads", "4"])
    with pytest.raises(ValueError, match="`width` .10. a multiple of twice `heads`"):
        lsh_pretrain.main()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, str]:
    made = {}
    for heads in (4, 2):
        made[heads] = str(tmp_path_factory.mktemp(f"llama{heads}"))
        LlamaConfig(**SIZES, num_key_value_heads=heads).save_pretrained(made[heads])
    return made


def test_check_takes_the_name(folders, capsys):
    assert main(["check", folders[4], "--inner_attention", "lsh"]) == 0
    assert "`hf_longctx.tie_query_key(model)`" in capsys.readouterr().out
    assert main(["check", folders[2], "--inner_attention", "lsh"]) == 2
    assert "2 key/value heads for 4 query heads, so `k_proj` cannot be tied" in capsys.readouterr().out


def test_plan_takes_the_name(folders, capsys):
    assert main(["plan", folders[2], "--inner_attention", "lsh"]) == 2
    assert "so `k_proj` cannot be tied" in capsys.readouterr().out
    assert main(["plan", folders[4], "--inner_attention", "LSH"]) == 2
    assert "`inner_attention` ('LSH') is not a kernel" in capsys.readouterr().out
    options = Namespace(
        model=folders[4],
        gpus=1,
        gpu_memory=80,
        cpu_memory=None,
        optimizer="adamw",
        wrapper=None,
        reversible=False,
        task="sft",
    )
    options.inner_attention = "lsh"
    config = LlamaConfig.from_pretrained(folders[4])
    settings = plan_search._settings(options, config)
    assert settings.num_hashes == 4
    setattr(config, LSH_KEY, LSHConfig(num_hashes=2).to_dict())  # a model that says so needs no option
    assert plan_search._settings(Namespace(**{**vars(options), "inner_attention": "auto"}), config).num_hashes == 2


def test_a_plan_counts_buckets_and_no_keys():
    planner = Planner(LlamaConfig(**SIZES, num_key_value_heads=4))
    held = [
        planner.breakdown(Settings(tokens=2**14, num_hashes=rounds, optimizer="sgd")).attention for rounds in (1, 9)
    ]
    bytes_a_round = 2 * 2**14 * SIZES["num_attention_heads"]
    assert held[1] - held[0] == 8 * bytes_a_round * SIZES["num_hidden_layers"]
    both = Settings(tokens=2**14, num_hashes=9, optimizer="sgd", reversible=True)
    # One layer at a time, so one layer's buckets.
    few = planner.breakdown(both.of(num_hashes=1)).device
    assert planner.breakdown(both).device - few == 8 * bytes_a_round
    with pytest.raises(ValueError, match="`num_hashes`"):
        Settings(tokens=1, num_hashes=0)

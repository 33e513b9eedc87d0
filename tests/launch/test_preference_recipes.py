"""The recipes of preference pairs, started as a user starts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


pytest.importorskip("trl")

from hf_longctx.data.documents import load_documents

from ..models import build
from ..preference import pairs
from ..tokenizer import tiny_tokenizer
from .test_recipes import TORCHRUN, start, write_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A tiny Llama, its tokenizer and pairs of answers in a jsonl file."""
    folder = tmp_path_factory.mktemp("pairs")
    build("llama", "sdpa").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    pairs().to_json(folder / "pairs.jsonl")
    return {"model": str(folder / "model"), "documents": str(folder / "pairs.jsonl")}


def history_of(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text())["history"]


def test_dpo_on_two_processes_logs_what_one_logs(inputs, tmp_path):
    changes = {"max_length": 64, "bf16": False, "num_eval_documents": 4, "per_device_train_batch_size": 2}
    config = write_config(tmp_path / "run.yaml", inputs, **changes)
    done = start(*TORCHRUN, "recipes/dpo.py", "--config", config, "--sequence_parallel_size", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    alone = start("-m", "hf_longctx", "dpo", "--config", config, "--output_dir", str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    shared, one = history_of(tmp_path / "run"), history_of(tmp_path / "alone")
    assert [entry["loss"] for entry in shared] == pytest.approx([entry["loss"] for entry in one], rel=1e-4)
    seen = [json.loads((tmp_path / name / "metrics.json").read_text())["train"] for name in ("run", "alone")]
    assert seen[0]["num_input_tokens_seen"] == seen[1]["num_input_tokens_seen"]
    assert (tmp_path / "run" / "README.md").is_file()


def test_reward_flags_a_file_without_pairs_and_trains_one_with(inputs, tmp_path):
    changes = {"max_length": 64, "bf16": False, "center_rewards_coefficient": 0.01}
    config = write_config(tmp_path / "run.yaml", inputs, **changes)
    done = start("-m", "hf_longctx", "reward", "--config", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(entry["loss"] > 0 for entry in history_of(tmp_path / "run"))
    config = write_config(tmp_path / "dpo.yaml", inputs, max_length=64, bf16=False, output_dir=str(tmp_path / "dpo"))
    load_documents(inputs["documents"], text_field=None).remove_columns("rejected").to_json(tmp_path / "half.jsonl")
    done = start("-m", "hf_longctx", "dpo", "--config", config, "--dataset_name", str(tmp_path / "half.jsonl"))
    assert done.returncode == 2 and "pairs need `chosen` and `rejected`" in done.stderr

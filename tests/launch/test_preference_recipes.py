"""The recipes of preference pairs, started as a user starts them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest


pytest.importorskip("trl")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_longctx import cli
from hf_longctx.data.documents import load_documents

from ..cards import check_card
from ..models import build
from ..training import reset_state
from .test_recipes import ROOT, start, write_config


sys.path.insert(0, str(ROOT / "recipes"))
from demo_dpo import COLORS, pair_of, write_pairs


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Of the words of the demo's texts, so that no word is padding."""
    rest = "The crate is in hall . Where the ? It I would guess that it may be".split()
    words = ["[PAD]", "[EOS]", *COLORS, *map(str, range(1, 10)), *dict.fromkeys(rest)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]", model_max_length=256
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A tiny Llama with the tokenizer of the demo's words, and its pairs in a jsonl file."""
    folder = tmp_path_factory.mktemp("pairs")
    build("llama", "sdpa").save_pretrained(folder / "model")
    toy_tokenizer().save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl", 16, crates=2)
    return {"model": str(folder / "model"), "documents": str(folder / "pairs.jsonl")}


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_the_demo_in_small_learns_and_two_processes_log_what_one_logs(inputs, tmp_path):
    """DPO of all weights, whose reference is a second model; the demo's own adapters are in `world/`."""
    changes = {"max_length": 64, "bf16": False, "num_eval_documents": 8, "per_device_train_batch_size": 4}
    config = write_config(tmp_path / "run.yaml", inputs, sequence_parallel_size=2, **changes)
    folder = tmp_path / "demo"
    done = start("recipes/demo_dpo.py", "--config", config, "--folder", str(folder), "--steps", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Losses are equal: two processes against one" in done.stdout
    shared, alone = (metrics_of(folder / name) for name in ("shared", "one_process"))
    losses = [[entry["loss"] for entry in metrics["history"]] for metrics in (shared, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] > losses[0][-1] + 0.01
    assert shared["eval_history"][0]["eval_rewards/accuracies"] >= 0.9
    assert shared["train"]["num_input_tokens_seen"] == alone["train"]["num_input_tokens_seen"]
    assert check_card(folder / "shared")["pipeline_tag"] == "text-generation"
    assert "| Training loss, nats per pair |" in (folder / "shared" / "README.md").read_text()


def test_pairs_of_the_demo_hold_their_answer():
    for index in range(8):
        row = pair_of(index, crates=3)
        color, hall = re.search(r"Where is the (\w+) crate", row["prompt"])[1], re.search(r"\d", row["chosen"])[0]
        assert f"The {color} crate is in hall {hall} ." in row["prompt"]
        assert re.search(r"\d", row["rejected"])[0] != hall


def test_reward_trains_on_pairs_and_a_file_without_them_is_refused(inputs, tmp_path, capsys):
    changes = {"max_length": 64, "bf16": False, "center_rewards_coefficient": 0.01, "license": "mit"}
    config = write_config(tmp_path / "run.yaml", inputs, **changes)
    done = start("-m", "hf_longctx", "reward", "--config", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(entry["loss"] > 0 for entry in metrics_of(tmp_path / "run")["history"])
    metadata = check_card(tmp_path / "run")
    assert metadata["pipeline_tag"] == "text-classification" and metadata["license"] == "mit"
    config = write_config(tmp_path / "dpo.yaml", inputs, max_length=64, bf16=False, output_dir=str(tmp_path / "dpo"))
    load_documents(inputs["documents"], text_field=None).remove_columns("rejected").to_json(tmp_path / "half.jsonl")
    reset_state()
    assert cli.main(["dpo", "--config", config, "--dataset_name", str(tmp_path / "half.jsonl")]) == 2
    assert "pairs need `chosen` and `rejected`" in capsys.readouterr().err

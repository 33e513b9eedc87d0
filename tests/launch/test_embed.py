"""The embedding recipe, started as a user starts it: two processes, a document shared by both, a source missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from ..cards import check_card
from ..embedding import embedder, texts
from .test_recipes import TORCHRUN, start


def write_inputs(folder: Path) -> str:
    embedder("bert").float().save(str(folder / "model"))
    lengths = tuple(3 + 5 * i % 17 for i in range(20))
    rows = zip(texts(lengths), texts(lengths, 100))
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {
        "model_name_or_path": str(folder / "model"),
        "max_seq_length": 64,
        "sources": {"pairs": str(folder / "pairs.jsonl"), "gone": str(folder / "gone.jsonl")},
        "eval_source": "pairs",
        "num_eval_rows": 6,
        "sequence_parallel_size": 2,
        "mini_batch_num_tokens": 30,
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0e-3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "run.yaml")


def test_embed_on_two_processes_leaves_an_ordinary_embedder_with_its_report(tmp_path):
    config = write_inputs(tmp_path)
    done = start(*TORCHRUN, "recipes/embed.py", "--config", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 2 sources are absent" in done.stdout
    run = tmp_path / "run"
    shared = json.loads((run / "metrics.json").read_text())
    assert (shared["sequence_parallel_size"], shared["data_parallel_size"]) == (2, 1)
    assert shared["sources"]["present"] == {"pairs": 14} and list(shared["sources"]["absent"]) == ["gone"]
    assert [entry["step"] for entry in shared["scores"]] == [0, 2]
    assert all(entry["tokens_per_second"] > 0 for entry in shared["history"])
    assert (run / "loss_and_throughput.png").read_bytes().startswith(b"\x89PNG")
    assert check_card(run)["library_name"] == "sentence-transformers"
    card = ModelCard.load(run / "README.md")
    assert {"hf_longctx", "sentence-transformers"} <= set(card.data.tags)
    assert card.text.count("## How it was trained with hf_longctx") == 1 and "1 of 2 sources: gone" in card.text
    assert str(tmp_path) not in card.text.split("### Command")[0]

    model = SentenceTransformer(str(run), device="cpu")  # an ordinary model again
    assert model[0].model.config._attn_implementation == "sdpa"
    assert torch.isfinite(torch.tensor(model.encode("alpha beta"))).all()

    shutil.rmtree(run)
    done = start("recipes/embed.py", "--config", config, "--sequence_parallel_size", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    alone = json.loads((run / "metrics.json").read_text())
    for one, other in zip(shared["history"], alone["history"], strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-4  # float32
    done = start("recipes/embed.py", "--config", config)
    assert done.returncode != 0 and "`output_dir`" in done.stderr

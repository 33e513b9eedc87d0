"""Two launchers that find each other by address and port, as two nodes do: one run, with the losses of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_longctx.tasks import sft

from ..models import build
from ..tokenizer import tiny_tokenizer, words
from ..training import reset_state


ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_file(tmp_path) -> Path:
    build("llama", "sdpa").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": words(4, i) + " ", "completion": words(5 + i % 9, i + 50)} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "dtype": "float32",
        "use_cpu": True,
        "bf16": False,
        "packing": True,
        "max_length": 40,
        "max_steps": 4,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file


def losses_in(folder: Path) -> list[float]:
    return [step["loss"] for step in json.loads((folder / "metrics.json").read_text())["history"]]


def test_two_launchers_train_as_one_process(run_file, monkeypatch):
    folder = run_file.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    nodes = []
    for rank in range(2):
        command = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
        command += ["--master_addr", "127.0.0.1", "--master_port", port, "-m", "hf_longctx", "sft"]
        command += ["--config", str(run_file), "--sequence_parallel_size", "2", "--output_dir", str(folder / "nodes")]
        options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        nodes.append(subprocess.Popen([sys.executable, *command], text=True, **options))
    monkeypatch.setattr(sys, "argv", ["sft", "--config", str(run_file), "--output_dir", str(folder / "one")])
    reset_state()
    sft.main()
    answers = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(answers)[-3000:]
    expected = losses_in(folder / "one")
    assert len(expected) == 4 and expected[0] != expected[-1]
    assert losses_in(folder / "nodes") == pytest.approx(expected, rel=1e-4)

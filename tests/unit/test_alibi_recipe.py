"""The toy that trains with ALiBi, rotary and learned positions, at a size of seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hf_longctx.tasks import pretrain_alibi


ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The recipe with a folder of ten small sources and other settings."""
    for number in range(10):
        (tmp_path / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)

    def start(*words: str) -> dict:
        config = str(ROOT / "recipes" / "pretrain_alibi_toy.yaml")
        small = ["--sources", str(tmp_path), "--score_rows", "4", "--width", "24", "--heads", "6", "--max_steps", "2"]
        folder = ["--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["pretrain_alibi.py", "--config", config, *small, *folder, *words])
        pretrain_alibi.main()
        return json.loads((tmp_path / "out" / "alibi.json").read_text())

    return start


def test_three_models_are_trained_and_scored_on_the_same_bytes(run, tmp_path):
    found = run()["models"]
    assert list(found) == ["alibi", "rotary", "learned"]
    for model in found.values():
        assert list(model["nats_per_byte"]) == ["64", "128", "256"]
        assert all(0 < value < 6 for value in model["nats_per_byte"].values())
    assert (tmp_path / "out" / "alibi.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "words, said",
    [
        (("--scored", "64"), "`scored` \\(64\\) must be below"),
        (("--heads", "5"), "must be a multiple of twice `heads`"),
        (("--sequence_parallel_size", "2"), "`sequence_parallel_size` \\(2\\) must be 1"),
        (("--score_tokens", "64", "9999"), "has 9,999: give more"),
    ],
)
def test_settings_that_cannot_be_scored_are_refused(run, words, said):
    with pytest.raises(ValueError, match=said):
        run(*words)


def test_too_few_sources_are_refused(tmp_path):
    (tmp_path / "one.py").write_text("x = 1")
    with pytest.raises(ValueError, match="must hold ten"):
        pretrain_alibi.read_bytes(str(tmp_path))

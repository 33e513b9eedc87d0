"""`hf-longctx verify --ttt`: the list that proves fast weights in any Llama-like type."""

from __future__ import annotations

import json
from dataclasses import replace

from hf_longctx.cli import main
from hf_longctx.proof import fast_weights
from hf_longctx.ttt import inner
from tests.models import config_of


def test_a_llama_like_type_is_proven(tmp_path, capsys):
    assert main(["verify", "qwen3", "--ttt", "--json", str(tmp_path / "proof.json")]) == 0
    found = json.loads((tmp_path / "proof.json").read_text())
    assert found["outcome"] == "exact" and len(found["checks"]) == 8
    assert all(check["error"] <= check["allowed"] for check in found["checks"])
    assert "exact" in capsys.readouterr().out


def test_a_step_that_loses_its_gradient_is_seen(monkeypatch):
    """First order instead of exact: every value is right, and one gradient is not."""
    original = inner.take_step

    def first_order(fast, means, step, builds):
        return original(fast, means, replace(step, exact=False), builds)

    monkeypatch.setattr(inner, "take_step", first_order)
    result = fast_weights.verify_fast_weights(config_of("llama"))
    assert not result and "finite differences" in result.message


def test_a_type_that_is_not_like_llama_is_refused(capsys):
    assert main(["verify", "gemma2", "--ttt"]) == 2
    assert "Gemma2DecoderLayer" in capsys.readouterr().out
    assert main(["verify", "no_such_type", "--ttt"]) == 3

"""`hf-longctx verify --ttt`: the list that proves fast weights in any Llama-like type."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longctx.cli import main
from hf_longctx.proof import fast_weights
from hf_longctx.proof.model_under_test import default_config
from hf_longctx.ttt import inner
from tests.fast_weights import loss_and_gradients, tiny_ttt, tokens
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


def test_gradients_that_are_lost_are_seen():
    """Finite differences of parameters whose gradient is missing, or zero."""
    model, ids = tiny_ttt(), tokens()
    _, gradients = loss_and_gradients(model, ids)
    names = "base.model.embed_tokens.weight", "primes.prime_layers.0.prime_up"
    for name, lost in ((names[0], None), (names[1], torch.zeros_like(gradients[names[1]]))):
        rest = {key: gradient for key, gradient in gradients.items() if key != name}
        error, place = fast_weights._finite_differences(model, ids, rest if lost is None else {**rest, name: lost})
        assert error > 1e-3 and place == ("parameters without a gradient" if lost is None else name)


def test_a_type_without_a_valid_configuration_is_said_to_have_none(monkeypatch):
    def broken():
        raise StrictDataclassClassValidationError("validate_sizes", ValueError("the size must be 0")) from ValueError(
            "the size must be 0"
        )

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "llama", broken)
    with pytest.raises(ValueError, match=r"`llama` has no default configuration that is valid \(the size must be 0\)"):
        default_config("llama")


def test_a_type_that_is_not_like_llama_is_refused(capsys):
    assert main(["verify", "gemma2", "--ttt"]) == 2
    assert "Gemma2DecoderLayer" in capsys.readouterr().out
    assert main(["verify", "no_such_type", "--ttt"]) == 3

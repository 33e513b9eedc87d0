"""Weights in a checkpoint are compared by the names under which transformers saves them."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hf_longctx.proof.tiny import shrink
from hf_longctx.resilience.checkpoint_weights import check_weights


def tiny(name: str) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_config(shrink(tf.AutoConfig.for_model(name)))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "jamba", "gpt_oss", "llama"])
def test_experts_that_are_stacked_in_memory_and_saved_one_by_one_are_the_same_weights(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    check_weights(model, tmp_path)
    check_weights(type(model).from_pretrained(tmp_path), tmp_path)
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    check_weights(model, tmp_path / "parts")


def test_an_expert_that_is_missing_or_of_another_size_is_refused(tmp_path):
    model, file = tiny("mixtral"), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    weights = load_file(file)
    name = next(name for name in weights if "experts.0" in name)
    save_file({**weights, name: torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is of another model: .* has shape \(3,\) there"):
        check_weights(model, tmp_path)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="is of another model: it lacks .*experts.0"):
        check_weights(model, tmp_path)

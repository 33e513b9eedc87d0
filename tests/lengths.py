"""Tiny models in which some layer derives a number from the length of the row, or from a position that it counts."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MoshiConfig, MoshiModel, Phi3Config, PhimoeConfig

from .models import _BASE, config_of


THRESHOLD = 12
LENGTH_MODELS = (
    ("llama", "dynamic"),
    ("llama", "longrope"),
    ("qwen3", "dynamic"),
    ("qwen3", "longrope"),
    ("phi3", "longrope"),
    ("phimoe", "longrope"),
    ("gemma3", "dynamic"),
    ("llama4", None),
)
if inspect.getsource(MoshiModel.forward).count("**kwargs") > 1:  # in older versions its attention never sees a shard
    LENGTH_MODELS += (("moshi", "dynamic"),)


def rope_of(kind: str, pairs: int = 4) -> dict[str, object]:
    """Rotary settings of a kind that changes at [`THRESHOLD`] tokens."""
    if kind == "dynamic":
        return {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    return {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "original_max_position_embeddings": THRESHOLD,
        "short_factor": [1.0] * pairs,
        "long_factor": [2.0 + pair for pair in range(pairs)],
        "short_mscale": 1.1,
        "long_mscale": 1.4,
        "factor": 8.0,
    }


def length_config(name: str, rope: str | None):
    """The configuration of one of [`LENGTH_MODELS`]."""
    if name == "llama4":
        return config_of(name, floor_scale=5, attn_scale=0.3, attention_chunk_size=64, no_rope_layers=[1, 0, 1, 0])
    changes = {"max_position_embeddings": THRESHOLD if rope == "dynamic" else 96, "rope_parameters": rope_of(rope)}
    if name in ("llama", "qwen3"):
        return config_of(name, **{"head_dim": 8, **changes})
    values = {**_BASE, **changes}
    if name == "phi3":
        changes["rope_parameters"]["partial_rotary_factor"] = 1.0
        return Phi3Config(**values, original_max_position_embeddings=THRESHOLD)
    if name == "phimoe":
        return PhimoeConfig(**values, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    if name == "gemma3":
        kinds = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": rope_of(rope)}
        values |= {"rope_parameters": kinds, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
        return Gemma3TextConfig(**values, layer_types=["sliding_attention", "full_attention"])
    return MoshiConfig(**values, head_dim=8, ffn_dim=64, sliding_window=64, num_codebooks=2)


def build_with_lengths(name: str, rope: str | None, attention: str, dtype: torch.dtype = torch.float64):
    """The model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(length_config(name, rope), attn_implementation=attention)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.to(dtype).eval()

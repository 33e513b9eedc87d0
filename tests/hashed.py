"""Tiny models on LSH attention, with shared queries and keys, and every threshold inside their rows."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_longctx import LSHConfig, tie_query_key, use_lsh

from .models import VOCAB, build


HEADS, VOCABULARY = 4, VOCAB
SETTINGS = {"num_hashes": 2, "window": 4, "num_buckets": 4}


def build_hashed(attention: str = "lsh", layout: str = "causal", dtype=torch.float64, ties: bool = True, **changes):
    """A Llama of two layers, always with the same weights; norms compute in the model's precision."""
    lsh = {name: changes.pop(name) for name in list(changes) if name in SETTINGS or name == "hash_seed"}
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 256}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=HEADS, num_key_value_heads=HEADS, pad_token_id=0, **sizes, **changes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    if ties:
        tie_query_key(model)
        use_lsh(model, LSHConfig(**{**SETTINGS, **lsh}, layout=layout))
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = torch.nn.Identity().forward  # transformers' casts to float32 inside
    return model.to(dtype)


def build_with_norms(attention: str, layout: str = "causal", ties: bool = True):
    """A Llama in float32, as the tests of trainers build it."""
    model = build("llama", attention, num_key_value_heads=6)
    if ties:
        tie_query_key(model)
        use_lsh(model, LSHConfig(**SETTINGS, layout=layout))
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))

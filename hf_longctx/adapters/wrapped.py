"""The transformers model inside what a trainer is given, and which attention it runs."""

from __future__ import annotations

from ..attention.registry import find_attention


def unwrap(model):
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def runs_our_attention(model) -> bool:
    """Whether the text part of `model` runs an attention of ours, which reads a batch's `sequence_shard`."""
    config = getattr(unwrap(model), "config", None)
    return config is not None and find_attention(config.get_text_config()._attn_implementation) is not None

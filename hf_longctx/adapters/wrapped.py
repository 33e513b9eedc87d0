"""The transformers model inside what a trainer or a loop is given, and which attention it runs."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from ..attention.registry import find_attention


def unwrap(model):
    """The transformers model inside DDP or a PEFT model, or the model itself."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def backbone_of(model):
    """A model of transformers without its head, or itself if it has none apart from it."""
    backbone = model.base_model
    return getattr(model, "model", model) if backbone is model else backbone  # Llama 4's prefix names nothing


def runs_our_attention(model) -> bool:
    """Whether the text part of `model` runs an attention of ours, which reads a batch's `sequence_shard`."""
    config = getattr(unwrap(model), "config", None)
    return config is not None and find_attention(config.get_text_config()._attn_implementation) is not None

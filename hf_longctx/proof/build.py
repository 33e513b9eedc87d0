"""The models of a proof: one on transformers' own attention, one on ours, with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from ..adapters.no_rotation import follow_alibi
from ..adapters.reversible import follow_reversible
from ..adapters.tied_query_key import tie_equal_weights, tie_query_key
from ..attention.lsh_models import runs_lsh_attention
from ..attention.registry import find_attention, name_that_packs
from ..attention.unadapted import ON_ALIBI
from ..config.lsh_settings import LSH
from .model_under_test import ModelUnderTest
from .tiny import validate_tiny


AUTO_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "multimodal-lm": AutoModelForMultimodalLM,
    "encoder": AutoModel,
    "embedding": AutoModel,
    "dpo": AutoModelForCausalLM,
    "reward": AutoModelForSequenceClassification,
}


def build_model(tested: ModelUnderTest, attention: str | None, dtype: torch.dtype) -> torch.nn.Module:
    """The model in training mode, without dropout; weights depend on the tested alone.

    Args:
        attention (`str`, *optional*): `None`: the default of transformers.
    """
    auto, config = AUTO_CLASSES[tested.task], copy.deepcopy(tested.config)
    if getattr(config, ON_ALIBI, False) and find_attention(attention) is None:
        attention = name_that_packs()  # which is all that computes it
    is_hashed = runs_lsh_attention(config)
    attention = LSH if is_hashed and attention is None else attention
    chosen = loading_options(config, attention, dtype)
    torch.manual_seed(0)
    if tested.weights is not None:
        model = auto.from_pretrained(tested.weights, config=config, dtype=torch.float32, **chosen)
    else:
        validate_tiny(config, _count_parameters(auto, config))
        model = _from_config(tested, auto, config, chosen)
        _draw_weights(model)
    turn_dropout_off(model)
    follow_alibi(model)
    follow_reversible(model)
    if is_hashed:  # weights that were drawn here are tied here; a model's own are as they are, or refused
        (tie_query_key if tested.weights is None else tie_equal_weights)(model)
    return model.to(dtype).train()


def _from_config(tested: ModelUnderTest, auto, config: PretrainedConfig, chosen: dict[str, Any]) -> torch.nn.Module:
    """On the chosen attention; of a multimodal model whose other parts do not know it, the text part alone."""
    try:
        return auto.from_config(copy.deepcopy(config), dtype=torch.float32, **chosen)
    except KeyError:
        if tested.task != "multimodal-lm" or "attn_implementation" not in chosen:
            raise
        chosen = {**chosen, "attn_implementation": {"text_config": chosen["attn_implementation"]}}
        return auto.from_config(config, dtype=torch.float32, **chosen)


def loading_options(config: PretrainedConfig, attention: str | None, dtype: torch.dtype) -> dict[str, str]:
    """Options about kernels for loading a model."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    if dtype == torch.float64 and hasattr(config, "_experts_implementation"):
        chosen["experts_implementation"] = "eager"  # transformers' grouped kernels do not support it
    return chosen


def turn_dropout_off(model: torch.nn.Module) -> None:
    """Also where a model does not read it from its configuration."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def sharded_model_on_meta(tested: ModelUnderTest) -> torch.nn.Module:
    """The model as it was given, on our attention, without memory."""
    with torch.device("meta"):
        return AUTO_CLASSES[tested.task].from_config(copy.deepcopy(tested.original), attn_implementation="ulysses")


def _count_parameters(auto, config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in auto.from_config(copy.deepcopy(config)).parameters())


@torch.no_grad()
def _draw_weights(model: torch.nn.Module) -> None:
    """Larger than the usual initialisation, so that attention is far from uniform and an error shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.15
        is_scale = parameter.dim() == 1 and not name.endswith("bias")
        parameter.copy_((1.0 if is_scale else 0.0) + noise)

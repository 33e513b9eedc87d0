"""Which layers can be in the suffix: refused by name, with how many of the last layers could."""

from __future__ import annotations

from typing import Any

from .base_parts import BaseParts


PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def validate_suffix(parts: BaseParts) -> None:
    """Raise `NotImplementedError` for suffix layers that lack parts, or have some without a second gradient, and for
    layers before them that are no attention."""
    for offset in reversed(range(parts.suffix_layers)):
        name, fit = f"layers.{len(parts.prefix) + offset}", parts.suffix_layers - 1 - offset
        _validate_parts(parts.suffix[offset], name, remedy(fit))
    for index, layer in enumerate(parts.prefix):
        if not hasattr(layer, "self_attn"):
            raise NotImplementedError(
                f"`layers.{index}` (`{type(layer).__name__}`) has no `self_attn`, and what a `TTTCache` holds of the "
                "layers before the suffix are windows of keys and values: take a Llama-like base model."
            )


def remedy(fit: int) -> str:
    """What to do about a layer that cannot be in the suffix, where only the last `fit` could."""
    return f"set `suffix_layers` to {fit} at most" if fit else "take a Llama-like base model"


def _validate_parts(layer: Any, name: str, remedy: str) -> None:
    missing = [part for part in PARTS if not hasattr(layer, part)]
    if missing:
        raise NotImplementedError(
            f"`{name}` (`{type(layer).__name__}`) has no `{missing[0]}`, and fast weights go between `self_attn` and "
            f"`mlp` of a layer like Llama's: {remedy}."
        )
    if any(hasattr(module, "experts") for module in layer.modules()):
        raise NotImplementedError(
            f"`{name}` (`{type(layer).__name__}`) routes tokens to experts, and the choice has no gradient that an "
            f"inner step could learn through: {remedy}."
        )
    for path, parameter in layer.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize == 1 or hasattr(parameter, "quant_state"):
            raise NotImplementedError(
                f"`{name}.{path}` is quantised ({str(parameter.dtype).removeprefix('torch.')}), and the gradient of "
                "an inner step cannot be differentiated through it: load the suffix layers in bfloat16 or wider."
            )
    if getattr(layer.self_attn, "config", None) is None:
        raise NotImplementedError(
            f"`{name}.self_attn` (`{type(layer.self_attn).__name__}`) has no `config` that names its kernel, so it "
            f"cannot run another one than the layers before: {remedy}."
        )

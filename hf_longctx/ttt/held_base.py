"""A base model that a TTT model holds: its kernels and window are changed, so it must not be called by itself.

The model runs the parts of its base and never the base's own forward, nor that of its decoder and suffix layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .base_parts import BaseParts


_OURS = __name__.partition(".")[0] + "."
_RUNS = "_runs_itself"  # set on a decoder while it is compared with its parts


def hold_base(parts: BaseParts) -> None:
    """From now on, refuse calls of the base model's own forward."""
    hooks = parts.decoder._forward_pre_hooks
    if _refuse_own_forward not in hooks.values():
        parts.decoder.register_forward_pre_hook(_refuse_own_forward)


def validate_free(base: Any) -> None:
    """Raise `ValueError` for a base model that a TTT model holds already."""
    if any(_refuse_own_forward in module._forward_pre_hooks.values() for module in base.modules()):
        raise ValueError(
            f"this `{type(base).__name__}` is held by a model with fast weights already, which set its window and "
            "kernels: load the base model once more, or copy it (`copy.deepcopy`) before it is held."
        )


@contextmanager
def base_runs_itself(parts: BaseParts) -> Iterator[None]:
    """Let the base model run as it did before it was held: all of its layers on one kernel."""
    attentions = [layer.self_attn for layer in parts.suffix]
    configs = [attention.config for attention in attentions]
    setattr(parts.decoder, _RUNS, True)
    try:
        for attention in attentions:
            attention.config = parts.config
        yield
    finally:
        setattr(parts.decoder, _RUNS, False)
        for attention, config in zip(attentions, configs, strict=True):
            attention.config = config


def _refuse_own_forward(decoder: Any, given: tuple) -> None:
    if not getattr(decoder, _RUNS, False):
        raise RuntimeError(
            f"this `{type(decoder).__name__}` is held by a model with fast weights, which set its window and the "
            "kernel of its last layers, so its own forward would be another model: call the model that holds it, or "
            "load the base model once more."
        )


def validate_hooks(model: Any, parts: BaseParts) -> None:
    """Raise `NotImplementedError` for hooks on modules that are never called: they would be left out in silence."""
    passed_over = {"base": model.base, "decoder": parts.decoder, "primes": model.primes}
    passed_over |= {f"layers.{len(parts.prefix) + index}": layer for index, layer in enumerate(parts.suffix)}
    for name, module in passed_over.items():
        if kind := _patch(module):
            raise NotImplementedError(
                f"`{name}` (`{type(module).__name__}`) has {kind}, which would not run: a model with fast weights "
                "runs the parts of its suffix layers and not their forward; put it on `self_attn`, `mlp` or a norm, "
                "or on the whole model."
            )


def _patch(module: Any) -> str | None:
    if "forward" in vars(module):
        return "a forward of its own, such as a device map's"
    tables = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    # This package's only watch, and know what does not run.
    if any(not str(getattr(hook, "__module__", "")).startswith(_OURS) for hooks in tables for hook in hooks.values()):
        return "a hook"
    return None

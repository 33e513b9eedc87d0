"""That the parts of a base model are the base model: watched on a few tokens while it runs by itself.

What passes between the parts is compared to the bit, whatever the precision: a factor of 1.04 would pass for noise in
bfloat16. What the suffix computes under its own kernel is compared with tolerance.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention.cache_names import CACHE_NAMES
from ..tiny_check import random_tokens
from .base_parts import BaseParts
from .held_base import base_runs_itself
from .prime_blocks import add_mlps, attend, differentiable_kernel
from .suffix_checks import remedy
from .window_masks import window_mask


_TOKENS = 5
# Between two kernels, which sum in another order; transformers' softmax and norms cast to float32 inside.
_ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-6}
_KNOWN = ("attention_mask", "position_ids", "position_embeddings", "cache_position")


@dataclass
class _Watched:
    """What one layer got and returned in the base model's own forward."""

    entered: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    attends: dict[str, Any] = field(default_factory=dict)
    left: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def compare_parts(base: Any, parts: BaseParts) -> None:
    """Raise unless every suffix layer, and the whole, is what the base model computes.

    The whole is compared on as many tokens as the window sees.

    Raises:
        ValueError: its weights give values that are not finite.
        NotImplementedError: it computes more than its parts.
    """
    _validate_dropout(base, parts)
    device = parts.embedding.weight.device
    ids = random_tokens(parts.config.vocab_size, 1, min(_TOKENS, parts.window)).to(device)
    was_training = base.training
    base.eval()
    try:
        with base_runs_itself(parts):
            layers, logits = _watch(base, parts, ids)
            _validate_finite(base, layers, logits)
            for offset in reversed(range(parts.suffix_layers)):
                _compare_layer(parts, offset, layers[len(parts.prefix) + offset])
            _compare_between(base, parts, ids, layers, logits)
        try:
            found = _run_parts(parts, ids)
        except Exception as error:
            reason = _reason(error)
            raise NotImplementedError(
                f"the layers of `{type(base).__name__}` do not run on a few tokens with a window "
                f"({type(error).__name__}: {reason}): take a Llama-like base model."
            ) from error
        # The masks and the kernel that chunks run with.
        _validate_equal(base, "its logits", logits, found, _ALLOWED.get(logits.dtype, 5e-2))
    finally:
        base.train(was_training)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _watch(base: Any, parts: BaseParts, ids: torch.Tensor) -> tuple[list[_Watched], torch.Tensor]:
    found = [_Watched() for _ in parts.layers]
    with ExitStack() as hooks:
        for layer, watched in zip(parts.layers, found, strict=True):
            hooks.enter_context(_watched_layer(layer, watched))
        try:
            logits = base(input_ids=ids, use_cache=False).logits
        except Exception as error:
            reason = _reason(error)
            raise NotImplementedError(
                f"`{type(base).__name__}` does not run on a few tokens ({type(error).__name__}: {reason}), so its "
                "parts cannot be compared with it."
            ) from error
    return found, logits


@contextmanager
def _watched_layer(layer: Any, watched: _Watched) -> Iterator[None]:
    def before(module: Any, arguments: tuple, named: dict[str, Any]) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = {**dict(zip(names, arguments)), **named}
        watched.entered = arguments[0] if arguments else given["hidden_states"]
        unwanted = (*names[:1], "hidden_states", *CACHE_NAMES)
        watched.attends = {name: value for name, value in given.items() if name not in unwanted}

    def after(module: Any, arguments: tuple, output: Any) -> None:
        watched.left = output[0] if isinstance(output, tuple) else output

    handles = layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _validate_dropout(base: Any, parts: BaseParts) -> None:
    inside = {id(module) for layer in parts.layers for module in layer.modules()}
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0 and id(module) not in inside:
            raise NotImplementedError(
                f"`{name}` of `{type(base).__name__}` drops values between its parts (p = {module.p}), which would "
                "be lost in chunks: set this dropout to 0 in the base's configuration."
            )


def _validate_finite(base: Any, layers: list[_Watched], logits: torch.Tensor) -> None:
    places = [("embedding", layers[0].entered), *((f"layers.{i}", layer.left) for i, layer in enumerate(layers))]
    for name, values in (*places, ("head", logits)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"what leaves the `{name}` of `{type(base).__name__}` is not finite on a few tokens: look for NaN or "
                "infinity in its weights, and for a precision that is too narrow."
            )


def _compare_between(
    base: Any, parts: BaseParts, ids: torch.Tensor, layers: list[_Watched], logits: torch.Tensor
) -> None:
    """What surrounds the layers, to the bit: scaled embeddings, capped logits and the like would be lost."""
    hidden_states = parts.embedding(ids)
    rotary, _ = parts.rotation(hidden_states, 0)
    for index, layer in enumerate(layers):
        _validate_equal(base, f"what enters `layers.{index}`", layer.entered, hidden_states)
        for own, table in zip(layer.attends.get("position_embeddings") or rotary, rotary, strict=True):
            _validate_equal(base, f"the rotation of `layers.{index}`", own, table)
        more = [
            name for name, value in layer.attends.items() if isinstance(value, torch.Tensor) and name not in _KNOWN
        ]
        if more:
            raise NotImplementedError(
                f"`{type(base).__name__}` gives `layers.{index}` a `{more[0]}`, which chunks do not have: take a "
                "Llama-like base model."
            )
        hidden_states = layer.left
    _validate_equal(base, "its logits", logits, parts.head(parts.norm(hidden_states)))


def _validate_equal(base: Any, what: str, own: torch.Tensor, parts: torch.Tensor, allowed: float = 0.0) -> None:
    off = (own - parts).abs().max() / own.abs().max().clamp(min=1e-12)
    if not bool(off <= allowed):
        raise NotImplementedError(
            f"`{type(base).__name__}` computes more than embedding, layers, norm and head: {what} and what the parts "
            f"give differ by {float(off):.1e} of the largest, so chunks would be another model; take a Llama-like "
            "base model."
        )


def _compare_layer(parts: BaseParts, offset: int, watched: _Watched) -> None:
    """A suffix layer against its parts, to the bit, with dropout too, whose draws are the same then."""
    layer, name = parts.suffix[offset], f"layers.{len(parts.prefix) + offset}"
    advice = remedy(parts.suffix_layers - 1 - offset)
    try:
        same = all(_is_its_parts(layer, watched, trains) for trains in (False, True))
    except Exception as error:
        reason = _reason(error)
        raise NotImplementedError(
            f"`{name}` (`{type(layer).__name__}`) cannot be taken apart ({type(error).__name__}: {reason}): {advice}."
        ) from error
    if not same:
        raise NotImplementedError(
            f"`{name}` (`{type(layer).__name__}`) computes more than its norms, `self_attn` and `mlp` with two "
            f"residuals, so a prime MLP would be in the wrong place: {advice}."
        )


def _is_its_parts(layer: Any, watched: _Watched, trains: bool) -> bool:
    device = watched.entered.device
    layer.train(trains)
    found = []
    try:
        for runs_parts in (False, True):
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                torch.manual_seed(0)
                if runs_parts:
                    found.append(add_mlps(layer, attend(layer, watched.entered, watched.attends), None))
                else:
                    own = layer.forward(watched.entered, **watched.attends)
                    found.append(own[0] if isinstance(own, tuple) else own)
    finally:
        layer.eval()
    return torch.equal(*found)


def _run_parts(parts: BaseParts, ids: torch.Tensor) -> torch.Tensor:
    """Logits as chunks compute them, before anything is learned."""
    hidden_states = parts.run_prefix(ids, None)
    rotary, positions = parts.rotation(hidden_states, 0)
    for index, layer in enumerate(parts.suffix):
        if index:
            config = layer.self_attn.config
            mask = window_mask(config._attn_implementation, config, hidden_states, parts.window, 0, skip=False)
            attends = {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}
            with differentiable_kernel(layer.self_attn):
                hidden_states = attend(layer, hidden_states, attends)
        hidden_states = add_mlps(layer, hidden_states, None)
    return parts.head(parts.norm(hidden_states))

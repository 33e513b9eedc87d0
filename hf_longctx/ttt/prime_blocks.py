"""A decoder layer of the base model, taken apart so that a prime MLP runs between attention and the layer's own MLP.

Each part runs as transformers wrote it. That the parts make up the layer is compared, to the bit, with its own forward
before anything is trained; a layer that computes more is refused by name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention.cache_names import cache_argument
from .prime import Fast, PrimeMLPs
from .window_masks import window_mask


PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
KeysValues = tuple[torch.Tensor, torch.Tensor]
_TOKENS = 5


class Carried:
    """What an attention layer takes for a cache: keys and values before the first new token, and all of them after it.

    Args:
        before (`tuple` of two tensors, *optional*): keys after their rotation, and values, `(B, K, c, H)` each.
    """

    def __init__(self, before: KeysValues | None) -> None:
        self._before = before
        self.after: KeysValues | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> KeysValues:
        if self._before is not None:
            key = torch.cat((self._before[0].to(key.dtype), key), dim=2)
            value = torch.cat((self._before[1].to(value.dtype), value), dim=2)
        self.after = (key, value)
        return self.after

    def last(self, tokens: int) -> KeysValues:
        """The last `tokens` of them."""
        assert self.after is not None
        key, value = self.after
        return key[:, :, max(key.shape[2] - tokens, 0) :], value[:, :, max(value.shape[2] - tokens, 0) :]


def run_layer(
    layer: Any,
    hidden_states: torch.Tensor,
    attends: dict[str, Any],
    carried: Carried | None,
    prime: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """One suffix layer on `(B, t, D)`.

    Args:
        layer: with the four parts.
        hidden_states (`torch.Tensor` of shape `(B, t, D)`).
        attends (`dict`): mask and positions for attention.
        carried ([`Carried`], *optional*): keys and values before these tokens.
        prime (`Callable`, *optional*): what the prime MLP adds.
    """
    attention = layer.self_attn
    keeps = {} if carried is None else {cache_argument(type(attention).forward): carried}
    with differentiable_kernel(attention):
        attended = attention(hidden_states=layer.input_layernorm(hidden_states), **attends, **keeps)[0]
    hidden_states = hidden_states + attended
    if prime is not None:
        hidden_states = hidden_states + prime(hidden_states)
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def differentiable_kernel(attention: Any) -> AbstractContextManager:
    """Torch's math backend where a layer runs `sdpa`: its other backends have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if attention.config._attn_implementation == "sdpa" else nullcontext()


def run_suffix(
    layers: list[Any],
    primes: PrimeMLPs,
    hidden_states: torch.Tensor,
    attends: dict[str, Any],
    carried: list[Carried],
    fast: Fast,
) -> torch.Tensor:
    """All suffix layers on one chunk, with the fast weights as they are."""
    for index, (layer, keys) in enumerate(zip(layers, carried)):
        own = fast[3 * index : 3 * index + 3]

        def prime(x: torch.Tensor, index: int = index, own: Fast = own) -> torch.Tensor:
            return primes.run(index, x, own)

        hidden_states = run_layer(layer, hidden_states, attends, keys, prime)
    return hidden_states


def own_window(layer: Any, window: int) -> dict[str, int]:
    """Set the window of a layer that has one of its own; what a layer without one passes to flash attention."""
    attention = layer.self_attn
    reads_own = "sliding_window" in inspect.getsource(type(attention).forward)
    if hasattr(attention, "sliding_window"):
        attention.sliding_window = window
    return {} if reads_own else {"sliding_window": window}


def set_kernel(layer: Any, name: str) -> None:
    """Let one layer's attention run `name`, whatever the rest of the model runs."""
    config = copy.copy(layer.self_attn.config)
    config._attn_implementation_internal = name
    layer.self_attn.config = config


def validate_parts(layer: Any, name: str) -> None:
    """Raise `NotImplementedError` for a layer without the four parts, or with parts that cannot be taken apart."""
    missing = [part for part in PARTS if not hasattr(layer, part)]
    if missing:
        raise NotImplementedError(
            f"`{name}` (`{type(layer).__name__}`) has no `{missing[0]}`, and fast weights go between `self_attn` and "
            "`mlp` of a layer like Llama's: make `suffix_layers` smaller, or take a Llama-like base model."
        )
    if any(hasattr(module, "experts") for module in layer.modules()):
        raise NotImplementedError(
            f"`{name}` (`{type(layer).__name__}`) routes tokens to experts, and the choice has no gradient that an "
            "inner step could learn through: make `suffix_layers` smaller, or take a dense base model."
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
            "cannot run another one than the layers before: take a Llama-like base model."
        )


@torch.no_grad()
def compare_with_own(layer: Any, name: str, hidden_states: torch.Tensor, rotary: Any, window: int) -> None:
    """Raise `NotImplementedError` unless the parts of a layer are, to the bit, its own forward on a few tokens."""
    hidden_states = hidden_states[:, :_TOKENS]
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
    config = layer.self_attn.config
    mask = window_mask(config._attn_implementation, config, hidden_states, window, 0, skip=False)
    attends = {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}
    try:
        with differentiable_kernel(layer.self_attn):
            own = layer(hidden_states, **attends)
        parts = run_layer(layer, hidden_states, attends, None, None)
        same = torch.equal(own[0] if isinstance(own, tuple) else own, parts)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise NotImplementedError(
            f"`{name}` (`{type(layer).__name__}`) cannot be taken apart ({type(error).__name__}: {reason}): make "
            "`suffix_layers` smaller, or take a Llama-like base model."
        ) from error
    if not same:
        raise NotImplementedError(
            f"`{name}` (`{type(layer).__name__}`) computes more than its norms, `self_attn` and `mlp` with two "
            "residuals, so a prime MLP would be in the wrong place: make `suffix_layers` smaller, or take a "
            "Llama-like base model."
        )

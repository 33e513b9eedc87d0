"""A decoder layer of the base model, taken apart so that a prime MLP runs between attention and the layer's own MLP.

Each part runs as transformers wrote it. That the parts make up the layer is compared, to the bit, with its own forward
before anything is trained (`base_comparison.py`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention.cache_names import cache_argument
from .prime import Fast, PrimeMLPs


KeysValues = tuple[torch.Tensor, torch.Tensor]


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


def attend(layer: Any, hidden_states: torch.Tensor, attends: dict[str, Any], carried: Any = None) -> torch.Tensor:
    """A layer's attention, and the residual around it, on `(B, t, D)`.

    Args:
        layer: with the four parts.
        hidden_states (`torch.Tensor` of shape `(B, t, D)`).
        attends (`dict`): mask and positions for attention.
        carried (*optional*): what it takes for a cache: keys and values before these tokens.
    """
    attention = layer.self_attn
    keeps = {} if carried is None else {cache_argument(type(attention).forward): carried}
    return hidden_states + attention(hidden_states=layer.input_layernorm(hidden_states), **attends, **keeps)[0]


def add_mlps(
    layer: Any, hidden_states: torch.Tensor, prime: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """What follows a layer's attention: the prime MLP, where there is one, and the layer's own, each a residual."""
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
    carried: Sequence[Any],
    fast: Fast,
) -> torch.Tensor:
    """The suffix on one chunk, with the fast weights as they are.

    Args:
        layers (`list`): of the suffix.
        primes ([`PrimeMLPs`]).
        hidden_states (`torch.Tensor` of shape `(B, t, D)`): what left the attention of the first layer, which sees no
            fast weights and has run before.
        attends (`dict`): mask and positions for attention of the layers after the first.
        carried (`list`): what each of these takes for a cache.
        fast (`list` of `torch.Tensor`).
    """
    for index, layer in enumerate(layers):
        own = fast[3 * index : 3 * index + 3]

        def prime(x: torch.Tensor, index: int = index, own: Fast = own) -> torch.Tensor:
            return primes.run(index, x, own)

        if index:
            with differentiable_kernel(layer.self_attn):
                hidden_states = attend(layer, hidden_states, attends, carried[index - 1])
        hidden_states = add_mlps(layer, hidden_states, prime)
    return hidden_states


def own_window(layer: Any, window: int) -> dict[str, int]:
    """Set the window of a layer that has one of its own; what a layer without one passes to flash attention."""
    attention = layer.self_attn
    kind: Any = type(attention)
    reads_own = _reads_own_window(kind)
    if hasattr(attention, "sliding_window"):
        attention.sliding_window = window
    return {} if reads_own else {"sliding_window": window}


@functools.cache  # every forward asks for every layer
def _reads_own_window(attention: Any) -> bool:
    return "sliding_window" in inspect.getsource(attention.forward)


def set_kernel(layer: Any, name: str) -> None:
    """Let one layer's attention run `name`, whatever the rest of the model runs."""
    config = copy.copy(layer.self_attn.config)
    config._attn_implementation_internal = name
    layer.self_attn.config = config

"""`SleepCache`: transformers' cache of a hybrid, with states that carry a gradient and keys that can be dropped.

transformers copies a new state into the old one, so that its address stays for CUDA graphs. A second pass over a
window then overwrites what backward needs. Here the new state takes the place of the old one: the numbers are the same
to the bit, and gradients flow through. `copied()` makes another cache that shares the tensors and none of what is
changed, so a pass is a function from one cache to the next, and can be recomputed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)


class _AssignedStates:
    """In front of a layer of transformers' cache: states are assigned, not copied in place."""

    conv_states: dict[int, torch.Tensor | None]
    recurrent_states: dict[int, torch.Tensor | None]
    conv_kernel_size: dict[int, int | None]
    has_previous_state: dict[int, bool]
    is_conv_states_initialized: dict[int, bool]
    is_recurrent_states_initialized: dict[int, bool]
    device: Any
    dtype: Any

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **kwargs):
        if not self.is_conv_states_initialized[state_idx]:
            if self.device is None:
                self.dtype, self.device = conv_states.dtype, conv_states.device
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.conv_kernel_size[state_idx] = size
            self.is_conv_states_initialized[state_idx] = True
        size = self.conv_kernel_size[state_idx]
        assert size is not None
        if self.has_previous_state[state_idx]:
            conv_states = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        else:
            self.has_previous_state[state_idx] = True
            missing = max(size - conv_states.shape[-1], 0)
            if missing:
                conv_states = torch.nn.functional.pad(conv_states, (missing, 0))
        self.conv_states[state_idx] = conv_states[..., -size:]
        return conv_states

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        before = self.recurrent_states[state_idx]
        self.is_recurrent_states_initialized[state_idx] = True
        # A copy would have cast to what the first pass left.
        recurrent_states = recurrent_states if before is None else recurrent_states.to(before.dtype)
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class _State(_AssignedStates, LinearAttentionLayer):
    pass


class _StateAndKeys(_AssignedStates, LinearAttentionAndFullAttentionLayer):
    pass


class _StateAndSlidingKeys(_AssignedStates, LinearAttentionAndSlidingWindowAttentionLayer):
    pass


_ASSIGNED = {
    LinearAttentionLayer: _State,
    LinearAttentionAndFullAttentionLayer: _StateAndKeys,
    LinearAttentionAndSlidingWindowAttentionLayer: _StateAndSlidingKeys,
}


class SleepCache(DynamicCache):
    """The cache of one batch of rows that sleep.

    Args:
        config (`PretrainedConfig`): of the model; it says which layers hold keys, and which hold states.

    Attributes:
        peak_keys (`int`): the most keys that a layer attended to so far, in this cache and its copies.

    Raises:
        NotImplementedError: a layer holds keys or states in a way of its own.
    """

    def __init__(self, config) -> None:
        super().__init__(config=config)
        self._peak = [0]
        for index, layer in enumerate(self.layers):
            kind = type(layer)
            if kind in _ASSIGNED:
                assigned = object.__new__(_ASSIGNED[kind])
                vars(assigned).update(vars(layer))
                self.layers[index] = assigned
            elif isinstance(layer, DynamicLayer) and kind not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise NotImplementedError(
                    f"layer {index} keeps a `{kind.__name__}`, which sleep does not know how to drop: train this "
                    "model without `sleep`."
                )

    @property
    def peak_keys(self) -> int:
        return self._peak[0]

    @property
    def state_layers(self) -> list[int]:
        """Layers that hold a recurrent state; known once a window has run."""
        return [
            index
            for index, layer in enumerate(self.layers)
            if any(state is not None for state in getattr(layer, "recurrent_states", {}).values())
        ]

    def update(self, *args, **kwargs):
        keys, values = super().update(*args, **kwargs)
        self._peak[0] = max(self._peak[0], keys.shape[-2])
        return keys, values

    def copied(self, *, own_states: bool = False) -> SleepCache:
        """Another cache with the same tensors; what is put into one is not in the other.

        Args:
            own_states (`bool`): states are copied too, for a single token: transformers then writes into them.
        """
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        for layer in other.layers:
            for name, values in list(vars(layer).items()):
                if isinstance(values, dict):
                    values = dict(values)
                    if own_states and name in ("conv_states", "recurrent_states"):
                        values = {index: None if state is None else state.clone() for index, state in values.items()}
                    setattr(layer, name, values)
        return other

    def drop_keys(self) -> None:
        """Forget all keys and values; states stay."""
        for layer in self._key_layers():
            _forget(layer)

    def keep_keys(self, num_tokens: int) -> None:
        """Forget all keys and values but those of the last `num_tokens` tokens; states stay."""
        for layer in self._key_layers():
            if not layer.is_initialized or num_tokens == 0:
                _forget(layer)
                continue
            layer.keys, layer.values = layer.keys[..., -num_tokens:, :], layer.values[..., -num_tokens:, :]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = layer.keys.shape[-2]

    def take_keys(self, other: SleepCache, layers: range | None = None) -> None:
        """Hold the keys and values of `other`, in all layers or in some."""
        for index, (layer, source) in enumerate(zip(self.layers, other.layers)):
            if isinstance(layer, DynamicLayer) and (layers is None or index in layers):
                layer.keys, layer.values, layer.is_initialized = source.keys, source.values, source.is_initialized
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length = source.cumulative_length

    def take_convolutions(self, other: SleepCache) -> None:
        """Hold the left context of short convolutions of `other`; zeros where it has none yet, as at a row's start."""
        for layer, source in zip(self.layers, other.layers):
            for index, state in getattr(layer, "conv_states", {}).items():
                if state is not None:
                    before = source.conv_states[index] if source.has_previous_state[index] else None
                    layer.conv_states[index] = torch.zeros_like(state) if before is None else before

    def select(self, rows: torch.Tensor) -> SleepCache:
        """The same for some rows."""
        other = self.copied()
        for layer in other.layers:
            for owner, name, value in _tensors(layer):
                owner[name] = value[rows]
        return other

    @staticmethod
    def joined(parts: list[tuple[torch.Tensor, SleepCache]]) -> SleepCache:
        """One cache from those of disjoint rows, which have seen equally many tokens.

        Args:
            parts (`list[tuple[torch.Tensor, SleepCache]]`): indices of rows, and their cache.
        """
        order = torch.cat([rows for rows, _ in parts]).argsort()
        other = parts[0][1].copied()
        for index, layer in enumerate(other.layers):
            others = [_tensors(cache.layers[index]) for _, cache in parts]
            for place, (owner, name, _) in enumerate(_tensors(layer)):
                owner[name] = torch.cat([tensors[place][2] for tensors in others])[order]
        return other

    def _key_layers(self) -> list[DynamicLayer]:
        return [layer for layer in self.layers if isinstance(layer, DynamicLayer)]


def _forget(layer: DynamicLayer) -> None:
    layer.keys = layer.values = None
    layer.is_initialized = False
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = 0


def _tensors(layer) -> list[tuple[dict, Any, torch.Tensor]]:
    """All tensors of a layer's cache with one entry a row: where each stands, and under which name."""
    found: list[tuple[dict, Any, torch.Tensor]] = []
    for name in ("keys", "values"):
        value = vars(layer).get(name)
        if value is not None and value.numel():
            found.append((vars(layer), name, value))
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, {})
        found += [(states, index, value) for index, value in states.items() if value is not None]
    return found

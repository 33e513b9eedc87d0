"""Buckets of cached keys, kept from one new token to the next: only new tokens are hashed.

A cache hands attention one tensor of all keys, and does not say what of it is new. So buckets are kept by the tensor
they were made of, for as long as it lives, and by how often it was changed in place. Before a layer runs, a hook looks
at the tensor that its cache holds: if that is one whose buckets are kept, and nothing changed it since, they are those
of the first keys which the cache is about to return, since it appends. What moves rows or places in a cache (beam
search, cropping) moves their buckets along. Anything else, such as a cache of quantized keys, is hashed again.

Price: two bytes a round, token and head, in the cache's place; a hook on each layer that generates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .cache_names import find_cache


class _Buckets(NamedTuple):
    """Buckets `(R, B, n, t)` of a tensor's first `t` keys, how often it had been changed, and what hashed them."""

    buckets: torch.Tensor
    version: int
    hashing: tuple


# By tensor of keys; by layer of a model: what its cache holds before a call, and the keys of a row without one.
_KEPT: Any = WeakTensorKeyDictionary()
_HELD: WeakKeyDictionary[torch.nn.Module, tuple[Any, _Buckets | None]] = WeakKeyDictionary()
_WHOLE: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()


def watch_cache(module: torch.nn.Module, key: torch.Tensor, tokens: int) -> None:
    """Let a layer keep buckets, if it may be generating.

    Args:
        module (`torch.nn.Module`): the attention layer, which gets a hook.
        key (`torch.Tensor` of shape `(B, n, K, H)`): what its cache returned, if it has one.
        tokens (`int`): of the query; as many keys are a whole row, whose cache begins here.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if not any(hook is _look_at_cache for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(_look_at_cache, with_kwargs=True)
    if key.shape[2] == tokens:
        _WHOLE[module] = ref(key)


def kept_buckets(module: torch.nn.Module, key: torch.Tensor, hashing: tuple) -> torch.Tensor | None:
    """Buckets `(R, B, n, t)` of the first keys of a cache, or `None`; `hashing` is what they are to be made by."""
    if torch.compiler.is_compiling():
        return None
    held, kept = _held(module)
    if held is None or kept is None or held.keys is not key or kept.hashing != hashing:
        return None
    return kept.buckets


def keep_buckets(module: torch.nn.Module, key: torch.Tensor, buckets: torch.Tensor, hashing: tuple) -> None:
    """Keep the buckets `(R, B, n, t)` of the first keys that a layer's cache returned."""
    if torch.compiler.is_compiling():
        return
    held, _ = _held(module)
    _HELD.pop(module, None)
    if torch.is_grad_enabled() or key.is_inference():
        return  # nothing counts changes of an inference tensor
    _KEPT[key] = _Buckets(buckets, key._version, hashing)
    if held is not None and held.keys is key:
        held.__class__ = _APPENDING[type(held)]


def keep_whole_row(module: torch.nn.Module, buckets: torch.Tensor, hashing: tuple) -> None:
    """Keep the buckets of a row, in which keys are the queries, for the cache that begins with it."""
    key = _WHOLE.pop(module, lambda: None)()
    if key is not None and key.shape[:3] == buckets.shape[1:]:
        keep_buckets(module, key, buckets, hashing)


def _look_at_cache(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """What the cache of a layer holds before the layer adds to it."""
    if torch.compiler.is_compiling():
        return
    _HELD.pop(module, None)
    _WHOLE.pop(module, None)
    if torch.is_grad_enabled():
        return
    cache = find_cache(kwargs) or next((each for each in args if isinstance(each, Cache)), None)
    layers, index = getattr(cache, "layers", ()), getattr(module, "layer_idx", None)
    if isinstance(index, int) and index < len(layers) and type(layers[index]) in _APPENDING:
        _HELD[module] = ref(layers[index]), _unchanged(layers[index].keys)


def _held(module: torch.nn.Module) -> tuple[Any, _Buckets | None]:
    """The layer of the cache that this call goes with, and the buckets of what it held before."""
    held, kept = _HELD.get(module, (lambda: None, None))
    return held(), kept


def _unchanged(key: torch.Tensor | None) -> _Buckets | None:
    """What is kept of a tensor that nothing changed since."""
    kept = None if key is None or key.is_inference() else _KEPT.get(key)
    return kept if kept is not None and key is not None and kept.version == key._version else None


def _reordered(buckets: torch.Tensor, key: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return buckets.index_select(1, rows.to(buckets.device))


def _selected(buckets: torch.Tensor, key: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return buckets[:, rows]


def _repeated(buckets: torch.Tensor, key: torch.Tensor, count: int) -> torch.Tensor:
    return buckets.repeat_interleave(count, dim=1)


def _cropped(buckets: torch.Tensor, key: torch.Tensor, _: int) -> torch.Tensor:
    return buckets[..., : key.shape[2]]


# What replaces the keys of a cache's layer, and what becomes of their buckets.
_MOVES = {
    "reorder_cache": _reordered,
    "batch_select_indices": _selected,
    "batch_repeat_interleave": _repeated,
    "crop": _cropped,
}


def _moving(parent: type, name: str) -> type:
    """A layer of a cache that moves buckets as it moves keys. It has no state of its own: a layer can become one."""

    def method_of(method: str, move: Callable) -> Callable:
        def run(self: Any, *args: Any, **kwargs: Any) -> None:
            kept = _unchanged(self.keys)
            getattr(parent, method)(self, *args, **kwargs)
            key = self.keys
            if kept is not None and key is not None and key.dim() == 4 and key not in _KEPT:
                moved = move(kept.buckets, key, *args, *kwargs.values())
                _KEPT[key] = _Buckets(moved, key._version, kept.hashing)

        return run

    methods = {method: method_of(method, move) for method, move in _MOVES.items()}
    return type(name, (parent,), {"__module__": __name__, **methods})


_Dynamic, _Static = _moving(DynamicLayer, "_Dynamic"), _moving(StaticLayer, "_Static")
# Layers of a cache that append to the keys they hold and return them all, and what they become.
_APPENDING = {DynamicLayer: _Dynamic, StaticLayer: _Static, _Dynamic: _Dynamic, _Static: _Static}

"""Whether the keys that a layer brings are its queries, asked at every call without waiting for the device.

Weights say it first, see [`lsh_models`][hf_longctx.attention.lsh_models]; what a layer does to one of both afterwards,
only the numbers say. On a CPU they are compared at once. On other devices those of the first call with some weights
are, so that a layer which is wrong is refused before the first step. Later ones are compared on the device, and the
answer, which comes by itself meanwhile, is read at the layer's next call.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from .lsh_models import has_shared_weights, query_key_modules


_READ_AT_ONCE = ("cpu",)


class _Asked(NamedTuple):
    """The weights that a first comparison was made with, and the answers of later ones, which may be on their way."""

    weights: tuple
    answers: list[tuple[torch.Tensor, Any]]


_ASKED: WeakKeyDictionary[torch.nn.Module, _Asked] = WeakKeyDictionary()


@torch.compiler.disable
def are_keys_queries(layer: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether keys are queries in all calls of a layer whose answer is known; that of a first call always is.

    Communication: none. The device is waited for once for each layer and its weights.
    """
    if query.device.type in _READ_AT_ONCE:
        return _are_equal(query, key)
    weights, asked = _weights_of(layer), _ASKED.get(layer)
    if asked is None or asked.weights != weights or query.shape != key.shape:
        _ASKED[layer] = _Asked(weights, [])
        return _are_equal(query, key)
    if query.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True  # answers cannot be read while a graph is recorded
    known = [index for index, (_, event) in enumerate(asked.answers) if event is None or event.query()]
    differ = [bool(asked.answers.pop(index)[0]) for index in reversed(known)]
    asked.answers.append(_ask(query, key))
    return not any(differ)


@torch.no_grad()
def _ask(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Whether any number differs, on its way to this process, and the event that says it has come."""
    # Into pinned memory, so that nothing waits.
    differs = _differ(query, key).to("cpu", non_blocking=True)
    if query.device.type != "cuda":
        return differs, None
    event = torch.cuda.Event()
    event.record()
    return differs, event


def _are_equal(query: torch.Tensor, key: torch.Tensor) -> bool:
    return torch.equal(query, key) or (query.shape == key.shape and not _differ(query, key))


def _differ(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    # Numbers that are none in both, as after an overflow, are no difference.
    return ((query != key) & ((query == query) | (key == key))).any()


def _weights_of(layer: torch.nn.Module) -> tuple:
    """Which parameters make queries and keys; and, if they are not the same, at what version."""
    pairs = [layer.get_submodule(name) for pair in query_key_modules(layer).items() for name in pair]
    parameters = [parameter for module in pairs for parameter in module.parameters()]
    shared = has_shared_weights(layer)
    return tuple((id(parameter), None if shared else _version_of(parameter)) for parameter in parameters)


def _version_of(parameter: torch.nn.Parameter) -> Any:
    # Nothing counts changes of an inference tensor: equal to no other.
    return object() if parameter.is_inference() else parameter._version

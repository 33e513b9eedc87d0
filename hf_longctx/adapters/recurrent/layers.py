"""Recurrent layers of transformers' models, each as its own code on a rank's tokens of whole rows.

What: [`follow_recurrences`] finds the layers whose `forward` calls a function of [`RULES`], and patches each instance.
The patched forward is transformers' code in which that function knows of ranks and documents.

A new kind of recurrence is a function in a file of this package and one row in `RULES`: by the name that transformers
gives the function, `rule(original, pieces, *args, **kwargs)`, with transformers' arguments and results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...attention.cache_names import CACHE_NAMES, find_cache
from ...attention.call_documents import refuse_cache
from ...attention.implicit_positions import packs_documents
from ...attention.registry import find_attention
from ...attention.unadapted import layers_with_state
from ...parallel.segments import DOCUMENT_BOUND_KEYS
from ..instance_forward import PatchHandle, named_arguments, put_on
from ..pass_shard import ForwardRows, ShardReader
from ..rebind import RebindPatch, called_names
from .convolution import convolve
from .delta_rule import delta_rule
from .pieces import pieces_of


RECURRENT = "recurrent layer"

RULES: dict[str, Callable] = {
    "causal_conv1d_fn": convolve,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
}

# How recurrent layers call the mask of padding tokens.
_MASK_NAMES = ("attention_mask", "conv_mask")


def follow_recurrences(model: torch.nn.Module) -> PatchHandle:
    """Patch the recurrent layers of one model, whose states then run over whole rows and end with each document.

    Args:
        model (`torch.nn.Module`): any; a model without such layers is left alone.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.
    """
    for module in list(model.modules()):
        if rules_of(module):
            put_on(module, RecurrentPatch())
    return PatchHandle(model, RECURRENT)


def rules_of(module: torch.nn.Module) -> dict[str, Callable]:
    """The rules by the name of the function that the layer's class calls; empty for every other module."""
    names = called_names(type(module).forward) if hasattr(type(module), "forward") else set()
    return {name: rule for name, rule in RULES.items() if name in names}


def unfollowed_layers(model: torch.nn.Module) -> list[str]:
    """Kinds of layers with a state along the sequence, as in `config.layer_types`, for which there is no adapter.

    Returns:
        their names; empty if at least as many modules of `model` can be followed as there are such layers. That all of
        them are exact is for the sanity check to find, which runs the model.
    """
    kinds = layers_with_state(model.config)
    layers = [kind for kind in model.config.get_text_config().layer_types or () if kind in kinds] if kinds else []
    return kinds if sum(bool(rules_of(module)) for module in model.modules()) < len(layers) else []


class RecurrentPatch(ShardReader, RebindPatch):
    """The layer's own forward, whose functions know of ranks and documents."""

    name = RECURRENT

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows = self.rows_of_call(module)
        # Bounds of one document say nothing, and without its kernels transformers refuses them.
        unbound = {name: value for name, value in kwargs.items() if name not in DOCUMENT_BOUND_KEYS}
        if rows.shard is None:
            return own(*args, **(unbound if find_attention(rows.attention) else kwargs))
        rows.shard.readers.add(id(module))
        given = named_arguments(module, args, kwargs)
        hidden_states = given["hidden_states"]
        pieces = pieces_of(rows.shard, len(hidden_states), hidden_states.device)
        if pieces.is_whole:
            return own(*args, **unbound)
        if rows.has_cache or (find_cache(given) is not None and packs_documents(rows.shard)):
            refuse_cache()
        given |= dict.fromkeys(set(CACHE_NAMES) & given.keys())  # an empty one, of a model whose `use_cache` is on
        forward = type(module).forward
        rules = {
            name: functools.partial(rule, called_function(forward, name), pieces)
            for name, rule in rules_of(module).items()
        }
        return self.run(module, own, rules, (), _with_padding(given, rows))


def called_function(forward: Callable, name: str) -> Callable:
    """What a global name means in the code of `forward`."""
    while getattr(forward, "__wrapped__", None) is not None:
        forward = forward.__wrapped__
    return forward.__globals__[name]


def _with_padding(given: dict[str, Any], rows: ForwardRows) -> dict[str, Any]:
    """The arguments of a layer with the mask of its tokens: transformers leaves it out for a row of one token."""
    if rows.padding is None or given["hidden_states"].shape[1] != 1:
        return given
    return {**given, **{name: rows.padding for name in _MASK_NAMES if name in given}}

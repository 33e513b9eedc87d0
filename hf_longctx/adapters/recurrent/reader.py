"""What recurrent layers share: a call on a share of rows, or on packed ones, runs with the pieces of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...attention.cache_names import CACHE_NAMES, find_cache
from ...attention.call_documents import refuse_cache
from ...attention.implicit_positions import packs_documents
from ...parallel.segments import DOCUMENT_BOUND_KEYS, segment_rows
from ...parallel.shard import SequenceShard
from ..instance_forward import named_arguments
from ..pass_shard import ForwardRows, ShardReader
from .pieces import SharePieces, pieces_of


RECURRENT = "recurrent layer"

# How layers call their tokens, and the mask of padding tokens.
_TOKEN_NAMES = ("hidden_states", "input_states")
_MASK_NAMES = ("attention_mask", "conv_mask")


class RecurrentReader(ShardReader):
    """A patch on a layer with a state along the sequence; a subclass says how its class runs on pieces."""

    name = RECURRENT
    tells_attention = True

    def follow(
        self, module: torch.nn.Module, own: Callable, pieces: SharePieces, rows: ForwardRows, given: dict[str, Any]
    ) -> Any:
        """The layer on pieces of documents, which ranks may share.

        Args:
            module (`torch.nn.Module`): the instance.
            own (`Callable`): its forward.
            pieces ([`SharePieces`]): of its tokens.
            rows ([`ForwardRows`]): of the forward that runs.
            given (`dict`): the arguments of the call by name, without a cache.
        """
        raise NotImplementedError

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows = self.rows_of_call(module)
        given = named_arguments(module, args, kwargs)
        hidden_states = next(given[name] for name in _TOKEN_NAMES if name in given)
        if rows.shard is None:
            return own(*args, **_without_bounds_of_one(kwargs, hidden_states))
        rows.shard.readers.add(id(module))
        pieces = pieces_of(rows.shard, len(hidden_states), hidden_states.device)
        if pieces.is_whole:
            return own(*args, **_without_bounds(kwargs))
        if rows.has_cache or (find_cache(given) is not None and not rows.is_cut):
            _refuse_cache(rows.shard)
        given |= dict.fromkeys(set(CACHE_NAMES) & given.keys())  # an empty one, of a model whose `use_cache` is on
        return self.follow(module, own, pieces, rows, _with_padding(given, rows))


def _refuse_cache(shard: SequenceShard) -> None:
    """Raise `ValueError` for a cache with packed documents, or with rows that several ranks share."""
    if packs_documents(shard):
        refuse_cache()
    raise ValueError(
        f"a cache was passed with rows that {shard.size} ranks share, where its states would be those of one rank's "
        "tokens: leave it out, or generate before the model is adapted."
    )


def _without_bounds(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in DOCUMENT_BOUND_KEYS}


def _without_bounds_of_one(kwargs: dict[str, Any], hidden_states: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments without bounds if those are of one document a row: transformers raises for any in PyTorch."""
    bounds = {name: kwargs[name] for name in DOCUMENT_BOUND_KEYS if kwargs.get(name) is not None}
    if not bounds:
        return kwargs
    rows, tokens = hidden_states.shape[:2]
    if segment_rows(bounds, rows, tokens, hidden_states.device)[0] is not None:
        return kwargs
    return _without_bounds(kwargs)


def _with_padding(given: dict[str, Any], rows: ForwardRows) -> dict[str, Any]:
    """The arguments of a layer with the mask of its tokens: transformers leaves it out for a row of one token."""
    tokens = next(given[name] for name in _TOKEN_NAMES if name in given)
    if rows.padding is None or tokens.shape[1] != 1:
        return given
    return {**given, **{name: rows.padding for name in _MASK_NAMES if name in given}}

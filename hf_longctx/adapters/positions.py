"""Let a decoder that numbers its tokens itself look up the positions of the shard.

How: `forward` of the decoder and of its table of positions are covered on these two objects. The decoder's sees the
call's `sequence_shard`, and lends its positions to the table for the duration of the call; nothing is kept after it.
The table is asked before the first layer, so recomputing a checkpointed layer does not ask again.

Without a shard and without packed documents both forwards are the host's own, so `generate()` changes nothing.
Price: a few integers a token, once a forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType

import torch
from transformers import PreTrainedModel

from ..attention.cache_names import CACHE_LENGTH_NAMES, find_cache
from ..attention.implicit_positions import FOLLOWED, counts_own_positions, local_positions, longest_document
from ..attention.packed import refuse_cache
from ..attention.registry import ATTENTION_FUNCTIONS
from ..parallel.segments import DOCUMENT_BOUND_KEYS, segment_rows
from ..parallel.shard import SequenceShard


_BELOW, _LENT, _OFF = "_forward_under_positions", "_positions_of_call", "_positions_not_followed"


def follow_positions(model: torch.nn.Module) -> FollowedPositions:
    """Cover the decoder of one model, in which tokens then have the positions of their rows and documents.

    Args:
        model (`torch.nn.Module`): a causal language model that numbers its tokens itself; the types are in
            `own_positions.COUNTING_TYPES`. Any other is left alone. Adapters and wrappers may come before or after.

    Returns:
        [`FollowedPositions`]: `remove()` gives the decoder its own forward back. Covering twice is covering once.

    Raises:
        NotImplementedError: the host has changed how such a decoder looks up positions.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    counting = [module for module in models if counts_own_positions(module.config)]
    decoders = [module for module in counting if _is_decoder(module)]
    if counting and not decoders:
        raise NotImplementedError(
            f"`{type(counting[0]).__name__}` has no decoder that looks up its positions as it did when hf_longctx was "
            "written: install a version of transformers that setup.py names, or set `sequence_parallel_size` to 1."
        )
    for decoder in decoders:
        vars(decoder).pop(_OFF, None)
        _cover(decoder, _decoder_forward(type(decoder)))
        _cover_tables(decoder)
    return FollowedPositions(decoders)


class FollowedPositions:
    """What [`follow_positions`] returns.

    Args:
        decoders (`list`): whose forward is covered; empty for a model that needs nothing.
    """

    def __init__(self, decoders: list[torch.nn.Module]) -> None:
        self.decoders = decoders

    def remove(self) -> None:
        """Give decoders and tables their own forward back. Where another has covered it since, ours steps aside."""
        for decoder in self.decoders:
            setattr(decoder, _OFF, True)
            for module in (decoder, *_tables(decoder)):
                _uncover(module)


def _is_decoder(module: torch.nn.Module) -> bool:
    return hasattr(module, "embed_positions") and bool(_tables(module))


def _tables(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The table of positions, or those inside an adapter that has replaced it."""
    return [module for module in decoder.embed_positions.modules() if _looks_up_positions(type(module))]


def _looks_up_positions(kind: type) -> bool:
    names = set(inspect.signature(kind.forward).parameters)
    return "position_ids" in names and not names.isdisjoint(CACHE_LENGTH_NAMES)


def _cover_tables(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    tables = _tables(decoder)
    for table in tables:
        _cover(table, _table_forward)
    return tables


def _cover(module: torch.nn.Module, forward: Callable) -> None:
    """Put `forward` over the module's own, once; a forward that the object had of its own is kept below."""
    if _BELOW in vars(module):
        return
    setattr(module, _BELOW, vars(module).get("forward"))
    module.forward = MethodType(forward, module)


def _uncover(module: torch.nn.Module) -> None:
    covering = vars(module).get("forward")
    if _BELOW not in vars(module) or getattr(covering, "__module__", None) != __name__:
        return
    below = vars(module).pop(_BELOW)
    del module.forward
    if below is not None:
        module.forward = below


def _own_forward(module: torch.nn.Module) -> Callable:
    """The forward that is covered."""
    return vars(module)[_BELOW] or MethodType(type(module).forward, module)


def _decoder_forward(kind: type) -> Callable:
    """The covering forward of a class of decoders, with the signature of its own, which hosts inspect."""

    names = tuple(inspect.signature(kind.forward).parameters)[1:]

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        own, given = _own_forward(self), {**dict(zip(names, args)), **kwargs}
        shard = None if _OFF in vars(self) else given.get("sequence_shard") or _documents_of_call(self, given)
        if shard is None:
            return own(*args, **kwargs)
        tables, positions = _cover_tables(self), local_positions(shard)
        _validate_length(self, tables, shard)
        for table in tables:
            setattr(table, _LENT, positions)
        try:
            return own(*args, **{**kwargs, "sequence_shard": shard, FOLLOWED: True})
        finally:
            for table in tables:
                delattr(table, _LENT)

    forward.__module__ = __name__
    return forward


def _table_forward(self, tokens, *args, **kwargs):
    """The host's lookup, of the positions that the decoder lent."""
    lent = vars(self).get(_LENT)
    if lent is None:
        return _own_forward(self)(tokens, *args, **kwargs)
    lent = lent.to(self.weight.device)
    # The host's own takes one row of positions; given them, it does not ask for the length of the cache.
    embedded = _own_forward(self)(tokens, position_ids=lent.flatten())
    return embedded if lent.dim() == 1 else embedded.view(*lent.shape, -1)


def _documents_of_call(decoder: torch.nn.Module, given: dict[str, object]) -> SequenceShard | None:
    """The documents of a batch that no one has cut. The decoder makes a mask of ones, behind which they would hide."""
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if (
        tokens is None
        or given.get("attention_mask") is not None
        or decoder.config._attn_implementation not in ATTENTION_FUNCTIONS
    ):
        return None
    rows, num_tokens = tokens.shape[:2]
    facts = {name: given[name] for name in DOCUMENT_BOUND_KEYS if given.get(name) is not None}
    positions = given.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape[1] == num_tokens:
        facts["position_ids"] = positions
    segments, only_right_padding = segment_rows(facts, rows, num_tokens, tokens.device)
    if segments is None:
        return None
    use_cache = given.get("use_cache")
    fills_cache = getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache
    if fills_cache or find_cache(given) is not None:
        refuse_cache()
    return SequenceShard(1, 0, num_tokens, num_tokens, segments, only_right_padding)


def _validate_length(decoder: torch.nn.Module, tables: list[torch.nn.Module], shard: SequenceShard) -> None:
    """Raise `ValueError` on every rank for a document that is longer than the table, which only some would miss."""
    known = min(table.num_embeddings - getattr(table, "offset", 0) for table in tables)
    if shard.num_tokens > known and longest_document(shard) > known:
        raise ValueError(
            f"a document has {longest_document(shard):,} tokens, but `{type(decoder).__name__}` has positions for "
            f"{known:,}: shorten documents, or load the model with a larger `max_position_embeddings`."
        )

"""Let a decoder with implicit position ids look up the positions of the shard.

How: patches `forward` of the decoder and of its position embedding. The decoder's sees the call's `sequence_shard`,
and passes its positions to the embedding for the duration of the call; nothing is kept after it. The embedding is
called before the first layer, so recomputing a checkpointed layer does not call it again.

Without a shard and without packed documents both forwards are transformers' own, so `generate()` changes nothing.
Price: a few integers a token, once a forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention.cache_names import CACHE_LENGTH_NAMES, find_cache
from ..attention.call_documents import documents_of_forward, refuse_cache
from ..attention.implicit_positions import FOLLOWED, local_positions, longest_document
from ..families import counts_positions
from ..parallel.shard import SequenceShard
from .instance_forward import InstancePatch, PatchHandle, named_arguments, patch_on, put_on
from .own_attention.counted_positions import table_of
from .pass_shard import ShardReader


_DECODER, _TABLE = "positions of the decoder", "positions of the table"


def follow_positions(model: torch.nn.Module) -> PatchHandle:
    """Patch the decoder of one model, in which tokens then have the positions of their rows and documents.

    Args:
        model (`torch.nn.Module`): a causal language model that counts its tokens itself; the types are in
            `families.COUNTS_POSITIONS`. Any other is left alone. Adapters and wrappers may come before or
            after.

    Returns:
        [`PatchHandle`]: `remove()` gives the decoder its own forward back. Patching twice is patching once.

    Raises:
        NotImplementedError: transformers has changed how such a decoder looks up positions.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    counting = [module for module in models if counts_positions(module.config) and not _has_another_table(module)]
    decoders = [module for module in counting if hasattr(module, "embed_positions") and _tables(module)]
    if counting and not decoders:
        raise NotImplementedError(
            f"`{type(counting[0]).__name__}` has no decoder that looks up its positions as it did when hf_longctx was "
            "written: install a version of transformers that setup.py names, or set `sequence_parallel_size` to 1."
        )
    for decoder in decoders:
        put_on(decoder, _DecoderPatch())
        for table in _tables(decoder):
            put_on(table, _TablePatch())
    return PatchHandle(model, _DECODER, _TABLE)


def _tables(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The position embedding, or those inside an adapter that has replaced it."""
    return [module for module in decoder.embed_positions.modules() if _looks_up_positions(type(module))]


def _looks_up_positions(kind: type[Any]) -> bool:
    names = set(inspect.signature(kind.forward).parameters)
    return "position_ids" in names and not names.isdisjoint(CACHE_LENGTH_NAMES)


def _has_another_table(model: torch.nn.Module) -> bool:
    """Whether a model looks up its positions where [`count_positions`] patches it."""
    return any(table_of(module) is not None for module in model.modules())


class _DecoderPatch(ShardReader):
    """Passes the positions of a call's shard to the position embeddings."""

    name = _DECODER

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given = named_arguments(module, args, kwargs)
        given_shard = given.get("sequence_shard") or (None if self.rows is None else self.rows.shard)
        shard = given_shard or _documents_of_batch(module, given)
        if shard is None:
            return own(*args, **kwargs)
        tables, positions = _tables(module), local_positions(shard)
        _validate_length(module, tables, shard)
        for table in tables:
            if patch_on(table, _TABLE) is None:  # an adapter has replaced it
                put_on(table, _TablePatch())
            patch_on(table, _TABLE).positions = positions
        try:
            return own(*args, **{**kwargs, "sequence_shard": shard, FOLLOWED: True})
        finally:
            for table in tables:
                patch_on(table, _TABLE).positions = None


class _TablePatch(InstancePatch):
    """Looks up the positions that the decoder passes, for the duration of one call."""

    name = _TABLE

    def __init__(self) -> None:
        self.positions: torch.Tensor | None = None

    def call(self, module: torch.nn.Module, own: Callable, tokens, *args, **kwargs):
        if self.positions is None:
            return own(tokens, *args, **kwargs)
        positions = self.positions.to(module.weight.device)
        # transformers' own takes one row of positions; given them, it does not need the length of the cache.
        embedded = own(tokens, position_ids=positions.flatten())
        return embedded if positions.dim() == 1 else embedded.view(*positions.shape, -1)


def _documents_of_batch(decoder: torch.nn.Module, given: dict[str, Any]) -> SequenceShard | None:
    """The documents of a batch that no one has cut. The decoder makes a mask of ones, behind which they would hide."""
    shard = documents_of_forward(decoder.config, given)
    if shard is None:
        return None
    use_cache = given.get("use_cache")
    fills_cache = getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache
    if fills_cache or find_cache(given) is not None:
        refuse_cache()
    return shard


def _validate_length(decoder: torch.nn.Module, tables: list[torch.nn.Module], shard: SequenceShard) -> None:
    """Raise `ValueError` on every rank for a document longer than the position embedding; only some may see it."""
    known = min(table.num_embeddings - getattr(table, "offset", 0) for table in tables)
    if shard.num_tokens > known and longest_document(shard) > known:
        raise ValueError(
            f"a document has {longest_document(shard):,} tokens, but `{type(decoder).__name__}` has positions for "
            f"{known:,}: shorten documents, or load the model with a larger `max_position_embeddings`."
        )

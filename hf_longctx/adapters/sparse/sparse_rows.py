"""The rows of a forward as sparse layers meet them, and those that they cannot take.

Sparse layers read more of a row than attention does: where windows and blocks of tokens begin, and keys of tokens that
are not the queries'. What says otherwise (a mask of the caller's own, a cache next to shared or packed rows, padding
in front of windows) is refused here, on all ranks alike.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from ...attention.cache_names import find_cache
from ...attention.call_documents import refuse_cache, shard_of_rows
from ...attention.compressed import RowsOfDocuments
from ...attention.deferred import DeferredMask
from ...attention.implicit_positions import packs_documents
from ...attention.masks import AttentionRule
from ...parallel.collectives import gather_integer_rows
from ...parallel.segments import PAD_SEGMENT
from ...parallel.shard import SequenceShard
from ..instance_forward import patches_on
from ..pass_shard import ForwardRows, ShardReader


logger = logging.getLogger(__name__)

# In `SequenceShard.derived`: the position of the first token of the document of each of my tokens.
FIRST_POSITIONS = "first positions"


def shard_of_layer(module: torch.nn.Module, rows: ForwardRows, given: dict[str, Any], window: int | None = None):
    """The rows of a sparse layer's call.

    Args:
        module (`torch.nn.Module`): the layer.
        rows ([`ForwardRows`]): of the forward.
        given (`dict`): the arguments of the layer by name.
        window (`int`, *optional*): tokens that a query sees next to what it selects; `None` for all.

    Returns:
        [`SequenceShard`], or `None` for rows of one document each with a cache, as `generate()` passes one.

    Raises:
        ValueError: a cache next to shared or packed rows.
        NotImplementedError: a mask that is not transformers' own for causal layers.
    """
    mask, cache = given.get("attention_mask"), find_cache(given)
    if mask is not None and not (isinstance(mask, DeferredMask) and mask.rule() == AttentionRule(True, window)):
        raise NotImplementedError(
            f"`{type(module).__name__}` got a mask of {type(mask).__name__} that is not transformers' own for causal "
            "layers, and its indexer would not obey it: pass an `attention_mask` of shape (rows, tokens), or "
            "`position_ids` that restart at each document."
        )
    shard, hidden_states = rows.shard, given["hidden_states"]
    if shard is None and cache is not None:
        return None
    if shard is None:
        count, tokens = hidden_states.shape[:2]
        return shard_of_rows({"attention_mask": rows.padding}, count, tokens, hidden_states.device)
    if shard.size > 1 and (rows.has_cache or rows.asks_for_cache):
        raise ValueError(
            f"`use_cache` is on for rows that {shard.size} processes share, and a cache would hold the tokens of one "
            f"of them, which `{type(module).__name__}` reads as those of the whole row: pass `use_cache=False`, or "
            "leave it out."
        )
    if packs_documents(shard) and (rows.has_cache or rows.asks_for_cache):
        refuse_cache()
    return shard


def refuse_left_padding(module: torch.nn.Module, documents: torch.Tensor | None) -> None:
    """Raise `NotImplementedError` if padding stands in front of a token of its row.

    Args:
        module (`torch.nn.Module`): the layer.
        documents (`torch.Tensor` of shape `(B, T)`, *optional*): of whole rows; -1 is padding, `None` none.
    """
    if documents is None:
        return
    if bool(((documents[:, :-1] == PAD_SEGMENT) & (documents[:, 1:] != PAD_SEGMENT)).any()):
        raise NotImplementedError(
            f"a row is padded on the left, and `{type(module).__name__}` counts windows or blocks of tokens from the "
            "first token of a row, padding included: pad on the right, or pack documents."
        )


def documents_from_start(module: torch.nn.Module, shard: SequenceShard, given: dict[str, Any]) -> RowsOfDocuments:
    """The documents of rows in whose layers windows or blocks are counted from the first token.

    Raises:
        NotImplementedError: padding in front of a document, or positions that do not go up by one in each. Every rank
            raises, whichever holds the tokens.

    Communication: 16 bytes a row and rank, once a batch.
    """
    hidden_states, name = given["hidden_states"], type(module).__name__
    rows = RowsOfDocuments.of_shard(shard, len(hidden_states), hidden_states.device)
    if FIRST_POSITIONS in shard.derived:
        return rows
    documents = rows.documents
    refuse_left_padding(module, documents)
    mine = slice(rows.start, rows.start + hidden_states.shape[1])
    positions = given.get("position_ids")
    counted = rows.positions[:, mine]
    first = positions - counted if isinstance(positions, torch.Tensor) else torch.zeros_like(counted)
    first = torch.where(documents[:, mine] == PAD_SEGMENT, 0, first)
    within = documents[:, mine].diff(dim=1) == 0
    rises = not bool((within & (first.diff(dim=1) != 0)).any())
    edges = torch.stack([first[:, 0], first[:, -1]], dim=1)
    edges = torch.cat([edges, torch.full_like(edges[:, :1], rises)], dim=1)
    found = gather_integer_rows(edges, shard.group if shard.size > 1 else None)
    places = torch.arange(1, shard.size, device=documents.device) * shard.local_len
    goes_on = documents[:, places] == documents[:, places - 1]
    breaks = goes_on.t() & (found[1:, :, 0] != found[:-1, :, 1])
    if bool(breaks.any()) or not bool(found[:, :, 2].all()):
        raise NotImplementedError(
            f"`position_ids` do not go up by one in each document, and `{name}` counts windows or blocks of tokens: "
            "leave them out, or let them restart with every document."
        )
    shard.derived[FIRST_POSITIONS] = first
    return rows


def refuse_wrapped_parts(*parts: torch.nn.Module | None) -> None:
    """Raise `NotImplementedError` for a part of a sparse layer of which PEFT keeps a copy to train.

    Args:
        parts (`torch.nn.Module`, *optional*): layers, their indexers and compressors.
    """
    for part in parts:
        original = None if part is None else part._modules.get("original_module")
        if original is not None:
            raise NotImplementedError(
                f"`modules_to_save` wraps `{type(original).__name__}` in a `{type(part).__name__}`, through which no "
                "adapter of sparse layers reaches it: name its linear layers in `target_modules` instead, or train it "
                "without PEFT."
            )


class SparseLayerPatch(ShardReader):
    """What the patches of sparse layers have in common."""

    def picks_all_below(self, module: torch.nn.Module) -> int:
        """Tokens of a row up to which a query of `module` picks all that it may see; 0 if it picks nothing."""
        raise NotImplementedError


class SparseRowsWatch:
    """Logs once that the indexers of a model pick everything, since its rows are that short.

    Args:
        model (`torch.nn.Module`): with its adapters; searched here, once, and not at every batch.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        found = ((patch.picks_all_below(module), type(module).__name__) for module, patch in _sparse_patches(model))
        self._most, self._layer = next((each for each in found if each[0]), (0, ""))

    def see(self, num_tokens: int) -> None:
        """Rows of so many tokens."""
        if num_tokens > self._most:
            return
        logger.warning(
            "rows have %d tokens, and `%s` picks everything before a query in rows of up to %d, so nothing is sparse "
            "and its indexer decides nothing: train on longer rows, or set a smaller `index_topk`.",
            num_tokens,
            self._layer,
            self._most,
        )
        self._most = 0


def _sparse_patches(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, SparseLayerPatch]]:
    for module in model.modules():
        for patch in patches_on(module):
            if isinstance(patch, SparseLayerPatch):
                yield module, patch

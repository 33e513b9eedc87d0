"""DeepSeek-V4's compressed attention on rows that ranks share, and on packed documents.

What: transformers counts the windows of its compressors from the first token of a row, and compares positions that
restart with entries that count on, so a packed document sees the entries of the first one and never its own. On a
share of a row, every rank would compress its own tokens only. Here windows, entries and what a query sees belong to
documents, whichever rank holds them.

How: patches `forward` of the layer, its compressor and its indexer. The layer's own code runs with a cache-shaped
object that puts the last tokens of the ranks before in front of its keys. The compressor projects its tokens, gets the
`2 m - 1` (`m - 1` where windows do not overlap) projected tokens before them, computes the entries whose last token is
on this rank and gathers those of all ranks.

Price a layer: two all-gathers of the ranks' last tokens, one of the entries and one of the indexer's, forward; the
reduce-scatters of all but the indexer's, backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from ...attention.cache_names import CACHE_NAMES
from ...attention.compressed import EntryTable, RowsOfDocuments, WindowAndEntries
from ...attention.registry import find_attention
from ...parallel.gathered import tokens_before
from ..instance_forward import InstancePatch, PatchHandle, named_arguments, patch_on, put_on
from .compressed_mask import CompressedMask
from .compressors import COMPRESSOR, CompressorPatch, compresses
from .indexer_objective import IndexerObjective
from .sparse_rows import SparseLayerPatch, documents_from_start, refuse_wrapped_parts, shard_of_layer


LAYER, HASH = "compressed layer", "routing by hash"


def follow_compressors(model: torch.nn.Module) -> PatchHandle:
    """Patch the layers of one model that attend to windows and compressed entries.

    Args:
        model (`torch.nn.Module`): any; one without such layers is left alone.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.

    Raises:
        NotImplementedError: PEFT keeps a copy of a layer or of a part of it to train.
    """
    modules = list(model.modules())
    for module in filter(is_compressed_layer, modules):
        refuse_wrapped_parts(module, module.compressor, getattr(module.compressor, "indexer", None))
    for module in modules:
        if is_compressed_layer(module):
            put_on(module, _LayerPatch())
            if module.compressor is not None:
                put_on(module.compressor, CompressorPatch())
        elif getattr(module, "is_hash", False) and hasattr(module, "gate"):
            put_on(module, _HashPatch())
    return PatchHandle(model, LAYER, COMPRESSOR, HASH)


def is_compressed_layer(module: torch.nn.Module) -> bool:
    """Whether `module` attends to a window, and to what a compressor makes of windows of tokens if it has one."""
    compressor = getattr(module, "compressor", None)
    if compressor is None:
        return all(hasattr(module, name) for name in ("compressor", "sinks", "sliding_window", "rope_layer_type"))
    return compresses(compressor)


class _TokensBefore:
    """What a layer gets as its cache: it puts the tokens before mine in front of the keys of mine."""

    def __init__(self, rows: RowsOfDocuments, window: int) -> None:
        self.rows, self.window = rows, window

    def update(self, keys: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `(B, 1, t, H)` of my tokens to `(B, 1, window - 1 + t, H)`."""
        extended = tokens_before(keys[:, 0], self.window - 1, self.rows.shard)[:, None]
        return extended, extended


class _LayerPatch(SparseLayerPatch):
    """Runs the layer's own code on keys and entries of whole rows."""

    name = LAYER
    objective: IndexerObjective | None = None

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        forward, given = self.rows_of_call(module), named_arguments(module, args, kwargs)
        if find_attention(module.config._attn_implementation) is None:
            return own(*args, **kwargs)
        shard = shard_of_layer(module, forward, given, module.sliding_window)
        if shard is None:  # generation: transformers' own states and bias, which needs its own kind of mask
            mask = given["attention_mask"]
            return own(**{**given, "attention_mask": None if mask is None else mask.build("eager")})
        rows = documents_from_start(module, shard, given)
        mask = given["attention_mask"] = CompressedMask()
        mask.objective = self.objective
        given |= dict.fromkeys(
            set(CACHE_NAMES) & inspect.signature(type(module).forward).parameters.keys(),
            _TokensBefore(rows, module.sliding_window),
        )
        given["sequence_shard"] = shard
        if module.compressor is None:
            mask.facts = WindowAndEntries(rows, EntryTable.none(rows), module.sliding_window, None)
            return own(**given)
        # The compressor completes the mask with what its indexer picks, before attention reads it.
        compressor = patch_on(module.compressor, COMPRESSOR)
        compressor.rows, compressor.mask, compressor.window = rows, mask, module.sliding_window
        try:
            return own(**given)
        finally:
            compressor.rows = compressor.mask = None

    def picks_all_below(self, module: torch.nn.Module) -> int:
        indexer = getattr(module.compressor, "indexer", None)
        return 0 if indexer is None else indexer.index_topk * indexer.compress_rate


class _HashPatch(InstancePatch):
    """Asks for the token ids by which experts are chosen."""

    name = HASH

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        if named_arguments(module, args, kwargs).get("input_ids") is None:
            raise ValueError(
                f"`{type(module).__name__}` routes tokens to experts by their ids, and the batch has `inputs_embeds` "
                "without `input_ids`: pass `input_ids`."
            )
        return own(*args, **kwargs)

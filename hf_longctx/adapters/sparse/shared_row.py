"""Sparse layers with a token indexer (DeepSeek Sparse Attention) on rows that ranks share, and on packed documents.

What: such a layer projects its tokens to small latents, picks the best earlier tokens of each query with an indexer,
and attends to them. Its own code already meets keys of other tokens than the queries', from a cache; so the sharded
layer gets a cache-shaped object whose `update` returns the latents of the whole row. Every rank then runs its own
queries against all keys, with any number of heads.

How: patches `forward` of the layer, which passes the object, and of its indexer, which picks for a block of queries at
a time, so that no scores of `T x T` exist. Which code computes keys, scores and outputs stays transformers'.

Price a layer: one all-gather of the latents (`kv_lora_rank + qk_rope_head_dim` numbers a token) and one of the
indexer's keys, forward; one reduce-scatter of the latents' gradients, backward.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...attention.cache_names import CACHE_NAMES, cache_argument
from ...attention.call_documents import shard_of_rows
from ...attention.indexed import RowMask, RowVisibility, queries_at_once
from ...attention.registry import find_attention
from ...parallel.collectives import gather_sequence
from ...parallel.gathered import gather_shares
from ...parallel.shard import SequenceShard
from ..instance_forward import InstancePatch, PatchHandle, named_arguments, patch_on, put_on
from ..pass_shard import ForwardRows
from .block_indexer import INDEXER, BlockIndexerPatch, picks_blocks
from .indexer_objective import IndexerObjective, TrainedRowMask
from .known_keys import KnownKeys, made_keys
from .pooled_indexer import (
    PooledIndexerPatch,
    mask_behind_cache,
    masks_picks,
    picks_pools,
    picks_to_mask,
    without_padding,
)
from .sparse_rows import (
    SparseLayerPatch,
    documents_from_start,
    refuse_left_padding,
    refuse_wrapped_parts,
    shard_of_layer,
)


LAYER = "sparse layer"


def follow_indexers(model: torch.nn.Module) -> PatchHandle:
    """Patch the sparse layers of one model and their indexers.

    Args:
        model (`torch.nn.Module`): any; one without such layers is left alone.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.

    Raises:
        NotImplementedError: PEFT keeps a copy of a layer or of its indexer to train.
    """
    layers = [module for module in model.modules() if is_sparse_layer(module)]
    refuse_wrapped_parts(*layers, *(module.indexer for module in layers))
    for module in layers:
        put_on(module, _LayerPatch())
        if module.indexer is not None:
            put_on(module.indexer, _patch_of(module.indexer))
    return PatchHandle(model, LAYER, INDEXER)


def _patch_of(indexer: torch.nn.Module) -> InstancePatch:
    if picks_blocks(indexer):
        return BlockIndexerPatch()
    return PooledIndexerPatch() if picks_pools(indexer) else _IndexerPatch()


def is_sparse_layer(module: torch.nn.Module) -> bool:
    """Whether `module` attends to tokens, or blocks of them, that an indexer picks."""
    indexer = getattr(module, "indexer", None)
    if indexer is None:  # one that attends to what an earlier layer picked
        return getattr(module, "skip_topk", False)
    return picks_tokens(indexer) or picks_blocks(indexer) or (picks_pools(indexer) and masks_picks(module))


def unserved_indexers(model: torch.nn.Module) -> list[str]:
    """The classes of a model's indexers for which there is no adapter."""
    parents = [module for module in model.modules() if getattr(module, "indexer", None) is not None]
    known = lambda parent: is_sparse_layer(parent) or hasattr(parent.indexer, "compress_rate")
    return sorted({type(parent.indexer).__name__ for parent in parents if not known(parent)})


def picks_tokens(indexer: torch.nn.Module) -> bool:
    """Whether an indexer scores single tokens, each by its own key; those that pool keys do not."""
    has_parts = all(hasattr(indexer, name) for name in ("wq_b", "wk", "weights_proj", "n_heads", "index_topk"))
    return has_parts and not hasattr(indexer, "index_kpool")


class WholeRow:
    """What a sharded layer gets as its cache: it returns what all ranks hold.

    Args:
        shard ([`SequenceShard`]): bound to its group.
        mask ([`RowMask`], *optional*): of the layer; counts what is gathered.
    """

    def __init__(self, shard: SequenceShard, mask: RowMask | None = None) -> None:
        self.shard, self.mask = shard, mask

    def update(self, first: torch.Tensor, second: torch.Tensor, *_: object, **__: object):
        """Latents `(B, 1, t, c)` and rotated keys `(B, 1, t, r)` of my tokens to those of the whole row.

        Communication: one all-gather, one reduce-scatter in the backward. Gradient: the sum over all queries.
        """
        sizes = first.shape[-1], second.shape[-1]
        if self.mask is not None:
            self.mask.numbers += first.shape[1] * sum(sizes)
        return self.gathered(torch.cat([first, second], dim=-1).transpose(1, 2)).transpose(1, 2).split(sizes, dim=-1)

    def gathered(self, local: torch.Tensor) -> torch.Tensor:
        """My tokens `(B, t, ...)` to those of the whole row, `(B, T, ...)`; see [`gather_shares`]."""
        whole = gather_shares(local, self.shard.group, self.shard.stopwatch)
        return whole.transpose(0, 1).flatten(1, 2)[:, : self.shard.num_tokens]


class _LayerPatch(SparseLayerPatch):
    """Passes the facts of whole rows to the layer's own forward."""

    name = LAYER
    objective: IndexerObjective | None = None

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows, given = self.rows_of_call(module), named_arguments(module, args, kwargs)
        if find_attention(module.config._attn_implementation) is None:
            return own(*args, **kwargs)
        pools = masks_picks(module)  # such a layer gets its padding as it is, which the rows tell as well
        shard = shard_of_layer(module, rows, {**given, **without_padding(given, rows)} if pools else given)
        if shard is None and pools:  # generation: the indexer's own pools, which leave out padding
            mask = mask_behind_cache(module, given)
            with picks_to_mask(module, mask):
                return own(**{**given, "sequence_shard": mask.shard})
        if shard is None:
            mask = given["attention_mask"] = _mask_over_cache(given, rows)
            if picks_blocks(module.indexer):
                refuse_left_padding(module, mask.visibility.segments)
        else:
            if picks_blocks(module.indexer):
                documents_from_start(module, shard, given)
            taken = set(CACHE_NAMES) & inspect.signature(type(module).forward).parameters.keys()
            visibility = RowVisibility.of_shard(shard, given["hidden_states"].device)
            mask = given["attention_mask"] = self._mask(visibility, shard)
            given |= dict.fromkeys(taken, WholeRow(shard, mask) if shard.size > 1 else None)
        given["sequence_shard"] = mask.shard
        if pools:
            with picks_to_mask(module, mask), _told(module.indexer, mask):
                return own(**given)
        with _told(module.indexer if picks_blocks(module.indexer) else None, mask):
            return own(**given)

    def _mask(self, visibility: RowVisibility, shard: SequenceShard) -> RowMask:
        if self.objective is None or not (self.objective.is_active or self.objective.is_dense):
            return RowMask(visibility, shard)
        return TrainedRowMask(visibility, shard, objective=self.objective)

    def picks_all_below(self, module: torch.nn.Module) -> int:
        indexer = module.indexer
        if indexer is None:
            return 0
        return indexer.topk_blocks * indexer.block_size if picks_blocks(indexer) else indexer.index_topk


@contextlib.contextmanager
def _told(indexer: torch.nn.Module | None, mask: RowMask) -> Iterator[None]:
    """A block in which the patch of an indexer knows the mask, which its own call does not get."""
    patch = None if indexer is None else patch_on(indexer, INDEXER)
    if patch is not None:
        patch.mask = mask
    try:
        yield
    finally:
        if patch is not None:
            patch.mask = None


def _mask_over_cache(given: dict[str, Any], rows: ForwardRows) -> RowMask:
    """The mask of rows of one document each whose keys begin in a cache."""
    mask, (count, tokens) = given["attention_mask"], given["hidden_states"].shape[:2]
    device = given["hidden_states"].device
    padding = rows.padding if mask is None else mask.padding
    num_keys = tokens if mask is None else mask.num_keys
    shard = shard_of_rows({"attention_mask": padding}, count, tokens, device)
    start = 0 if mask is None else int(mask.offset)
    return RowMask(RowVisibility(num_keys, start, shard.segment_ids), shard)


class _IndexerPatch(InstancePatch):
    """Picks for a block of queries at a time, among the keys of the whole row."""

    name = INDEXER

    @torch.no_grad()
    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given = named_arguments(module, args, kwargs)
        mask = given["attention_mask"]
        if not isinstance(mask, RowMask):
            return own(*args, **kwargs)
        cache = cache_argument(type(module).forward)
        hidden_states, row = given["hidden_states"], given.get(cache)
        keys = made_keys(own, given, cache)
        if isinstance(row, WholeRow):
            mask.numbers += keys.shape[-1]
            keys = gather_sequence(keys, row.shard.group)[:, : row.shard.num_tokens]
        elif row is not None:
            keys = row.update_indexer(keys, module.layer_idx)
        picks, tokens = [], hidden_states.shape[1]
        block = queries_at_once(len(keys) * keys.shape[1] * module.n_heads)
        for start in range(0, tokens, block):
            queries = slice(start, min(start + block, tokens))
            part = {name: _of_queries(value, queries, tokens) for name, value in given.items()}
            seen = mask.visibility.dense(queries, hidden_states.device)
            picks.append(own(**{**part, "attention_mask": seen, cache: KnownKeys(keys)}))
        if isinstance(mask, TrainedRowMask) and mask.trains:
            mask.scores = _scores(module, given, mask, cache)
        return torch.cat(picks, dim=1)


def _scores(module: torch.nn.Module, given: dict[str, Any], mask: RowMask, cache: str) -> Callable:
    """From queries to the scores that the indexer's own code gives all keys; only its parameters get a gradient."""
    forward = inspect.unwrap(type(module).forward)  # without the decorator that turns gradients off
    given = {name: _detached(value) for name, value in given.items()}
    row, tokens = given.get(cache), given["hidden_states"].shape[1]
    with torch.enable_grad():
        keys = made_keys(partial(forward, module), given, cache)
        if isinstance(row, WholeRow):
            keys = row.gathered(keys)

    def scores(queries: slice) -> torch.Tensor:
        part = {name: _of_queries(value, queries, tokens) for name, value in given.items()}
        seen = mask.visibility.dense(queries, keys.device)
        with torch.enable_grad(), _TopkInput() as watch:
            forward(module, **{**part, "attention_mask": seen, cache: KnownKeys(keys)})
        return watch.scores

    return scores


class _TopkInput(TorchFunctionMode):
    """Keeps what the picks of an indexer are the largest of."""

    scores: torch.Tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.topk, torch.Tensor.topk):
            self.scores = args[0]
        return func(*args, **(kwargs or {}))


def _detached(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_detached(item) for item in value)
    return value.detach() if isinstance(value, torch.Tensor) else value


def _of_queries(value: Any, queries: slice, tokens: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_of_queries(item, queries, tokens) for item in value)
    has_tokens = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == tokens
    return value[:, queries] if has_tokens else value

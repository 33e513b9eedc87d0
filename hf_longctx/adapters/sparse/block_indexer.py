"""An indexer that picks blocks of keys (MiniMax-M3), counted from the first token of each document.

What: transformers counts blocks from the first token of a row, so those of a packed document depend on what stands
before it, and a share of a row has blocks of its own. Here each document is picked for on its own, among its keys on
all ranks.

How: patches `forward` of the indexer. Its own code runs for the tokens of one document at a time, a block of queries
after the other; picked blocks become picked tokens, which is what attention reads here.

Price a layer: one all-gather of the indexer's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...attention.cache_names import cache_argument, find_cache
from ...attention.indexed import RowMask, queries_at_once
from ...parallel.collectives import gather_sequence
from ...parallel.segments import PAD_SEGMENT
from ..instance_forward import InstancePatch, named_arguments
from .known_keys import KnownKeys, made_keys


INDEXER = "indexer"


def picks_blocks(indexer: torch.nn.Module | None) -> bool:
    """Whether an indexer picks blocks of keys for each key/value head."""
    return all(hasattr(indexer, name) for name in ("block_size", "topk_blocks", "build_block_mask"))


class BlockIndexerPatch(InstancePatch):
    """Picks blocks of the documents of whole rows."""

    name = INDEXER

    def __init__(self) -> None:
        self.mask: RowMask | None = None

    @torch.no_grad()
    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        mask, given = self.mask, named_arguments(module, args, kwargs)
        if mask is None:
            return own(*args, **kwargs)
        name = cache_argument(type(module).forward)
        cache: Any = find_cache(given)
        follows = cache is not None and mask.shard.size == 1  # generation
        if follows and mask.visibility.start:
            return _tokens_of(own(*args, **kwargs), module.block_size, mask.visibility.num_tokens)
        keys = made_keys(own, given, name)
        if follows:
            cache.layers[module.layer_idx].update_index(keys)
        shard, tokens = mask.shard, given["hidden_states"].shape[1]
        mask.numbers += keys.shape[-1] if shard.size > 1 else 0
        keys = gather_sequence(keys, shard.group if shard.size > 1 else None, dim=2)[:, :, : shard.num_tokens]
        count = module.topk_blocks * module.block_size
        picks = keys.new_full((len(keys), module.num_heads, tokens, count), -1, dtype=torch.long)
        for row, queries, begin, end in queries_of_documents(mask, module.num_heads, len(keys), tokens):
            document = keys[row : row + 1, :, begin:end]
            found = _pick(module, own, given, row, queries, document, mask.visibility.start - begin)
            picks[row, :, queries, : found.shape[-1]] = torch.where(found >= 0, found + begin, -1)[0]
        return picks


def queries_of_documents(mask: RowMask, heads: int, rows: int, tokens: int) -> Iterator[tuple[int, slice, int, int]]:
    """Row, my queries, and the bounds of their document in the whole row; at most a block of queries each."""
    visibility = mask.visibility
    first, total = visibility.start, visibility.num_tokens
    segments = visibility.segments
    for row in range(rows):
        ids = torch.zeros(total, dtype=torch.long) if segments is None else segments[row].cpu()
        values, counts = ids.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        for value, begin, end in zip(values.tolist(), [0, *ends], ends):
            low, high = max(begin - first, 0), min(end - first, tokens)
            if value == PAD_SEGMENT:
                continue
            block = queries_at_once((end - begin) * heads)
            for start in range(low, high, block):
                yield row, slice(start, min(start + block, high)), begin, end


def _pick(
    module: torch.nn.Module,
    own: Callable,
    given: dict[str, Any],
    row: int,
    queries: slice,
    keys: torch.Tensor,
    shift: int,
) -> torch.Tensor:
    """The tokens that queries of one document pick, `(1, heads, queries, k)`, counted from its first; -1 is none."""
    here = slice(row, row + 1)
    cosines, sines = given["position_embeddings"]
    positions = torch.arange(queries.start, queries.stop, device=keys.device)[None] + shift
    part = {
        "hidden_states": given["hidden_states"][here, queries],
        "position_embeddings": tuple(x[here if len(x) > 1 else slice(None), queries] for x in (cosines, sines)),
        cache_argument(type(module).forward): KnownKeys(keys),
        "position_ids": positions,
    }
    return _tokens_of(own(**part), module.block_size, keys.shape[2])


def _tokens_of(blocks: torch.Tensor, size: int, num_keys: int) -> torch.Tensor:
    """The tokens of picked blocks, -1 for those behind the last key and of -1."""
    tokens = blocks[..., None] * size + torch.arange(size, device=blocks.device)
    return torch.where((blocks[..., None] >= 0) & (tokens < num_keys), tokens, -1).flatten(-2)

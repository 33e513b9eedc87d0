"""An indexer that picks pools of keys (GLM-5-Next), counted from the first token of each document.

What: transformers counts pools from the first real token of a row, so those of a packed document depend on what
stands before it, and a share of a row has pools of its own. Here each document is picked for on its own, among its
keys on all ranks. The layer of such an indexer makes a mask of what was picked; here attention gets the picks.

How: patches `forward` of the indexer. Its own code runs for the tokens of one document at a time, a block of queries
after the other, with a cache-shaped object that holds the document's keys so far.

Price a layer: one all-gather of the indexer's keys and of what weighs them in a pool.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...attention.cache_names import cache_argument, find_cache
from ...attention.call_documents import shard_of_rows
from ...attention.indexed import RowMask, RowVisibility
from ...parallel.collectives import gather_sequence
from ..instance_forward import InstancePatch, named_arguments
from ..pass_shard import ForwardRows
from .block_indexer import INDEXER, queries_of_documents
from .known_keys import KnownKeys, made_keys


# The method of a layer that makes a mask of picks.
_MASK_OF_PICKS = "build_attention_mask_from_topk"


def picks_pools(indexer: torch.nn.Module | None) -> bool:
    """Whether an indexer scores pools of keys that it makes itself, of any number of tokens."""
    return all(hasattr(indexer, name) for name in ("index_kpool", "get_pooled_states", "append_visible_tail"))


def masks_picks(module: torch.nn.Module) -> bool:
    """Whether a layer turns what its indexer picked, or an earlier layer's, into a mask."""
    return hasattr(module, _MASK_OF_PICKS) and hasattr(module, "skip_topk")


@contextlib.contextmanager
def picks_to_mask(module: torch.nn.Module, mask: RowMask) -> Iterator[None]:
    """A block in which `module` hands its picks to `mask`, and `mask` to attention."""

    def keep(topk_indices: torch.Tensor, *_: object, **__: object) -> RowMask:
        mask.picks = topk_indices
        return mask

    setattr(module, _MASK_OF_PICKS, keep)
    try:
        yield
    finally:
        delattr(module, _MASK_OF_PICKS)


def without_padding(given: dict[str, Any], rows: ForwardRows) -> dict[str, None]:
    """What to leave out of the arguments of a layer: its mask, if that only says what the rows say as well."""
    mask = given["attention_mask"]
    if not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return {}
    is_known = rows.padding is not None or rows.is_cut or find_cache(given) is not None
    return {"attention_mask": None} if is_known or bool(mask.all()) else {}


def mask_behind_cache(module: torch.nn.Module, given: dict[str, Any]) -> RowMask:
    """The mask of rows whose keys begin in a cache, and whose picks are real tokens."""
    cache: Any = find_cache(given)
    (count, tokens), device = given["hidden_states"].shape[:2], given["hidden_states"].device
    start = cache.get_seq_length(module.layer_idx)
    return RowMask(RowVisibility(start + tokens, start, None), shard_of_rows({}, count, tokens, device))


class PooledIndexerPatch(InstancePatch):
    """Picks pools of the documents of whole rows."""

    name = INDEXER

    def __init__(self) -> None:
        self.mask: RowMask | None = None

    @torch.no_grad()
    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        mask, given = self.mask, named_arguments(module, args, kwargs)
        if mask is None:
            return own(*args, **kwargs)
        name, hidden_states = cache_argument(type(module).forward), given["hidden_states"]
        real = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        states = made_keys(own, {**given, "attention_mask": real}, name)
        shard = mask.shard
        mask.numbers += states.shape[-1] if shard.size > 1 else 0
        states = gather_sequence(states, shard.group if shard.size > 1 else None)[:, : shard.num_tokens]
        count = module.index_topk + module.index_kpool - 1
        picks = torch.full((*hidden_states.shape[:2], count), -1, dtype=torch.long, device=hidden_states.device)
        for row, queries, begin, _ in queries_of_documents(mask, module.n_heads, *hidden_states.shape[:2]):
            here = slice(row, row + 1)
            end = mask.visibility.start + queries.stop
            part = {
                "hidden_states": hidden_states[here, queries],
                "q_resid": given["q_resid"][here, queries],
                "attention_mask": real[here, queries],
                name: KnownKeys(states[here, begin:end]),
            }
            found = own(**part).long()
            picks[row, queries, : found.shape[-1]] = torch.where(found >= 0, found + begin, -1)[0]
        return picks

"""Attention layers on transformers' interface whose decoder layers keep from them what a batch brings.

StableLM and Nemotron call their attention without further keyword arguments, so it never sees the shard, nor what
other adapters say in it. The patch adds them, from the rows of the forward that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...attention.cache_names import find_cache
from ...attention.call_documents import refuse_cache
from ...attention.implicit_positions import LENGTHS_FOLLOWED, packs_documents
from ..instance_forward import named_arguments, patch_on, put_on
from ..pass_shard import ShardReader
from ..rotary_lengths import ROTARY


KEYWORDS = "keywords of attention"

# Classes of attention whose callers drop keyword arguments.
WITHOUT_KEYWORDS = ("NemotronAttention", "StableLmAttention")


def pass_keywords(model: torch.nn.Module) -> None:
    """Patch the attention layers of `model` that get no keyword arguments; after what rotary embeddings need."""
    follows_lengths = any(patch_on(module, ROTARY) is not None for module in model.modules())
    for module in list(model.modules()):
        if any(kind.__name__ in WITHOUT_KEYWORDS for kind in type(module).__mro__):
            put_on(module, KeywordPatch(follows_lengths))


class KeywordPatch(ShardReader):
    """Adds the shard and the positions of the running forward to the arguments.

    Args:
        follows_lengths (`bool`): the rotary embedding of the model follows the lengths of whole rows.
    """

    name = KEYWORDS

    def __init__(self, follows_lengths: bool) -> None:
        self.follows_lengths = follows_lengths

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows = self.rows_of_call(module)
        if rows.shard is None:
            return own(*args, **kwargs)
        given = named_arguments(module, args, kwargs)
        fills_cache = find_cache(given) is not None and packs_documents(rows.shard)
        if rows.has_cache or fills_cache:
            refuse_cache()
        added: dict[str, Any] = {"sequence_shard": rows.shard}
        if self.follows_lengths:
            added[LENGTHS_FOLLOWED] = True
        if given.get("position_ids") is None and rows.positions is not None:
            added["position_ids"] = rows.positions
        return own(*args, **{**kwargs, **added})

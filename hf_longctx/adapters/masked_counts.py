"""Models that scale the embeddings of a row by how many of its tokens are masked: right without masked tokens only.

What: ESM with `token_dropout` divides by the unmasked part of the row that it is given. A rank is given its share, and
a packed document comes with its neighbours. Without a masked token the scale is a constant and nothing is wrong.

How: a patch of `forward` on the model looks at the tokens, and refuses masked ones on all ranks of a group at once.
Price: 8 bytes a rank and forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..attention.call_documents import shard_of_forward
from ..attention.implicit_positions import COUNTS_FOLLOWED, packs_documents
from ..families import ROW_COUNT_FIELD
from ..parallel.collectives import gather_integers
from .instance_forward import InstancePatch, named_arguments, put_on


COUNTED = "masked tokens of the rows"


def patch_counts(model: torch.nn.Module) -> None:
    """Patch every module of `model` whose embeddings count the masked tokens of a row."""
    for module in list(model.modules()):
        if getattr(getattr(module, "embeddings", None), ROW_COUNT_FIELD, False):
            put_on(module, _CountingPatch())


class _CountingPatch(InstancePatch):
    """Lets rows without masked tokens pass."""

    name = COUNTED

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given = named_arguments(module, args, kwargs)
        shard = shard_of_forward(module, given)
        if shard is None or (shard.size == 1 and not packs_documents(shard)):
            return own(*args, **kwargs)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        masked = 0 if ids is None else int((ids == module.embeddings.mask_token_id).sum())
        empty = 0 if ids is None or mask is None else int((mask.sum(dim=-1) == 0).any())  # 0 / 0 for such a share
        if sum(gather_integers(masked + empty, shard.group)):
            raise NotImplementedError(
                f"`{ROW_COUNT_FIELD}` (True) scales the embeddings of `{type(module).__name__}` by how many tokens of "
                "the row are masked, and a rank sees its share of a row and a packed document its neighbours: train "
                f"masked rows unpacked with `sequence_parallel_size` 1, or load the model with `{ROW_COUNT_FIELD}="
                "False`."
            )
        return own(*args, **{**kwargs, COUNTS_FOLLOWED: True})

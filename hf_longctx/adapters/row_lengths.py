"""Let layers that derive a number from the local length or position use those of whole rows and single documents.

Rotary embeddings whose frequencies depend on the length, queries that are scaled by positions that layers count, and
embeddings that are scaled by the masked tokens of a row. Without a shard and without packed documents every forward
is transformers' own.
"""

from __future__ import annotations

import torch

from .instance_forward import PatchHandle
from .masked_counts import COUNTED, patch_counts
from .query_scales import LAYER, PROJECTION, patch_scales
from .rotary_lengths import CALLER, ROTARY, patch_rotary


# Names of the patches.
LENGTH_PATCHES = (CALLER, ROTARY, LAYER, PROJECTION, COUNTED)


def follow_lengths(model: torch.nn.Module) -> PatchHandle:
    """Patch what depends on lengths in one model; it then sees those of whole rows, or of each packed document.

    Args:
        model (`torch.nn.Module`): any; most have nothing to patch and are left alone. Adapters and wrappers may come
            before or after.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.
    """
    patch_rotary(model)
    patch_scales(model)
    patch_counts(model)
    return PatchHandle(model, *LENGTH_PATCHES)

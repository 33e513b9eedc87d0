"""Everything that an instance needs before its rows are shared or packed, put on in one call."""

from __future__ import annotations

import torch

from ..parallel.adapted import Adapted, mark, unmark
from .axial_positions import follow_axial_positions
from .embedding_norm import follow_embedding_norm
from .few_bits import keep_gradients
from .instance_forward import PatchHandle, take_off
from .loop_batches import LOOP_BATCHES
from .no_rotation import follow_alibi
from .own_attention.own_layers import follow_own_attention
from .pass_shard import CALLER, pass_shard
from .positions import follow_positions
from .recurrent.layers import follow_recurrences
from .reversible import follow_reversible
from .router_losses import follow_router_losses
from .row_lengths import follow_lengths
from .sparse.compressed_layers import follow_compressors
from .sparse.shared_row import follow_indexers
from .text_planes import add_text_planes
from .wrapped import unwrap


# What models need, by kind; each leaves a model that does not need it alone.
_ADAPTERS = (
    follow_alibi,
    follow_embedding_norm,
    follow_positions,
    follow_lengths,
    follow_recurrences,
    follow_own_attention,
    follow_router_losses,
    add_text_planes,
    follow_indexers,
    follow_compressors,
)


class AttachedAdapters(PatchHandle):
    """What [`attach_adapters`] put on a model; `remove()` takes all of it off, and the mark with it."""

    def remove(self) -> None:
        super().remove()
        unmark(self.model)


def attach_adapters(model: torch.nn.Module, adapted: Adapted | None = None) -> AttachedAdapters:
    """Put on a model the adapters that its type needs, and mark it, so that its attention takes shared rows.

    Args:
        model (`torch.nn.Module`): changed in place, on this instance only. Wrappers may come before or after.
        adapted ([`Adapted`], *optional*): how it trains, for `shard_batch`.

    Returns:
        [`AttachedAdapters`]: `remove()` undoes it. Attaching twice is attaching once.

    Raises:
        NotImplementedError: an adapter does not know this version of the model.
    """
    keep_gradients(model)
    follow_axial_positions(model)  # these two are what the model is, and no adapters that `remove` takes off
    follow_reversible(model)
    names = [name for follow in _ADAPTERS for name in follow(model).names]
    pass_shard(model)
    take_off(unwrap(model), LOOP_BATCHES)  # a trainer looks after its batches itself
    mark(model, adapted)
    return AttachedAdapters(model, *names, CALLER, LOOP_BATCHES)

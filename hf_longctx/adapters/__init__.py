"""Patches of a model instance that make it train exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .no_rotation import use_alibi as use_alibi
    from .positions import follow_positions as follow_positions
    from .router_losses import follow_router_losses as follow_router_losses
    from .row_lengths import follow_lengths as follow_lengths
    from .tiled_loss import tile_loss as tile_loss
    from .tiled_mlp import tile_mlp as tile_mlp

_EXPORTS = {
    "positions": ("follow_positions",),
    "router_losses": ("follow_router_losses",),
    "row_lengths": ("follow_lengths",),
    "tiled_loss": ("tile_loss",),
    "tiled_mlp": ("tile_mlp",),
    "no_rotation": ("use_alibi",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

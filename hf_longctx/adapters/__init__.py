"""Patches of a model instance that make it train exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .axial_positions import AxialPositionEmbedding as AxialPositionEmbedding
    from .axial_positions import use_axial_positions as use_axial_positions
    from .no_rotation import use_alibi as use_alibi
    from .positions import follow_positions as follow_positions
    from .reversible import make_reversible as make_reversible
    from .router_losses import follow_router_losses as follow_router_losses
    from .row_lengths import follow_lengths as follow_lengths
    from .tiled_loss import tile_loss as tile_loss
    from .tiled_mlp import tile_mlp as tile_mlp

_EXPORTS = {
    "axial_positions": ("AxialPositionEmbedding", "use_axial_positions"),
    "positions": ("follow_positions",),
    "reversible": ("make_reversible",),
    "router_losses": ("follow_router_losses",),
    "row_lengths": ("follow_lengths",),
    "tiled_loss": ("tile_loss",),
    "tiled_mlp": ("tile_mlp",),
    "no_rotation": ("use_alibi",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

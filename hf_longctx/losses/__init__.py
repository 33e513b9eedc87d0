"""Losses that stay exact when the sequence is cut, as functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .contrastive import contrastive_loss as contrastive_loss
    from .tiled_logits import tiled_cross_entropy as tiled_cross_entropy
    from .tiled_scores import tiled_token_scores as tiled_token_scores

_EXPORTS = {
    "contrastive": ("contrastive_loss",),
    "tiled_logits": ("tiled_cross_entropy",),
    "tiled_scores": ("tiled_token_scores",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

"""Global batches drawn from many weighted sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .loader import build_source_loader as build_source_loader
    from .plan import SourcePlan as SourcePlan
    from .plan import load_source_weights as load_source_weights

_EXPORTS = {
    "loader": ("build_source_loader",),
    "plan": ("SourcePlan", "load_source_weights"),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

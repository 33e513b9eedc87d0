"""Estimates of memory before a run; changes no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .memory_plan import Planner as Planner
    from .settings import Settings as Settings

_EXPORTS = {
    "memory_plan": ("Planner",),
    "settings": ("Settings",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

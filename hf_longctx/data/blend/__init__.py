"""Several corpora in one data set, in exact proportions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .blended_rows import BlendedRows as BlendedRows

_EXPORTS = {"blended_rows": ("BlendedRows",)}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

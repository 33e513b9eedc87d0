"""Callbacks and pages that report on a run without touching its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .blend_report import BlendReport as BlendReport
    from .embedding_report import EmbeddingReport as EmbeddingReport
    from .meter import ThroughputMeter as ThroughputMeter
    from .report import RunReport as RunReport

_EXPORTS = {
    "blend_report": ("BlendReport",),
    "embedding_report": ("EmbeddingReport",),
    "meter": ("ThroughputMeter",),
    "report": ("RunReport",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

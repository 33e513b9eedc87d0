"""Attention functions on torch and transformers' registries, and the checks of what documents see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers.modeling_utils  # noqa: F401  its import registers our names, which needs this room whole

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .contamination import assert_no_cross_document as assert_no_cross_document
    from .explain import explain_attention as explain_attention

_EXPORTS = {
    "contamination": ("assert_no_cross_document",),
    "explain": ("explain_attention",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

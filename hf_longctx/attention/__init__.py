"""Attention functions on torch and transformers' registries, and the checks of what documents see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers.modeling_utils  # noqa: F401  its import registers our names, which needs this room whole

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .call import AttentionCall as AttentionCall
    from .contamination import assert_no_cross_document as assert_no_cross_document
    from .deferred import deferred_mask as deferred_mask
    from .explain import explain_attention as explain_attention
    from .registry import AttentionEntry as AttentionEntry
    from .registry import register_attention as register_attention
    from .ulysses import attend_sharded as attend_sharded

_EXPORTS = {
    "call": ("AttentionCall",),
    "contamination": ("assert_no_cross_document",),
    "deferred": ("deferred_mask",),
    "explain": ("explain_attention",),
    "registry": ("AttentionEntry", "register_attention"),
    "ulysses": ("attend_sharded",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

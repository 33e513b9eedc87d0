"""Models that learn from what they read (TTT-E2E): fast weights that take a gradient step after every chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .base_settings import complete_settings as complete_settings
    from .cached_forward import TTTOutput as TTTOutput
    from .fast_cache import TTTCache as TTTCache
    from .fast_config import TTTModelConfig as TTTModelConfig
    from .fast_model import TTTForCausalLM as TTTForCausalLM

_EXPORTS = {
    "fast_cache": ("TTTCache",),
    "fast_config": ("TTTModelConfig",),
    "fast_model": ("TTTForCausalLM",),
    "cached_forward": ("TTTOutput",),
    "base_settings": ("complete_settings",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

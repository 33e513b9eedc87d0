"""What the user wants: frozen dataclasses that are valid from the moment they exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .run import LongContextConfig as LongContextConfig

_EXPORTS = {
    "run": ("LongContextConfig",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

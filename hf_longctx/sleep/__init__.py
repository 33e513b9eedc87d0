"""Sleep: a hybrid thinks over the window that it is about to forget, and keeps it in its recurrent states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .generate import sleep_generate as sleep_generate
    from .loss import sleep_loss as sleep_loss

_EXPORTS = {
    "generate": ("sleep_generate",),
    "loss": ("sleep_loss",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

"""Proof that anyone can repeat: a model shared by several processes against the same model in one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .result import VerifyResult as VerifyResult
    from .verification import verify as verify

_EXPORTS = {
    "result": ("VerifyResult",),
    "verification": ("verify",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

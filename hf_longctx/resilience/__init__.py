"""Fault tolerance of the trainers: non-finite steps, checkpoints, signals, hangs, replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .replicas import ReplicaGuard as ReplicaGuard

_EXPORTS = {
    "replicas": ("ReplicaGuard",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

"""Torch only: the mesh, and how tensors move between ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .collectives import gather_sequence as gather_sequence
    from .mesh import SequenceMesh as SequenceMesh
    from .shard import SequenceShard as SequenceShard
    from .shard import shard_batch as shard_batch

_EXPORTS = {
    "collectives": ("gather_sequence",),
    "mesh": ("SequenceMesh",),
    "shard": ("SequenceShard", "shard_batch"),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

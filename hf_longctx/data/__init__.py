"""From data sets to the rows that every rank of a group reads together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .documents import load_documents as load_documents
    from .documents import split_into_rows as split_into_rows
    from .shard_collator import ShardCollator as ShardCollator

_EXPORTS = {
    "documents": ("load_documents", "split_into_rows"),
    "shard_collator": ("ShardCollator",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

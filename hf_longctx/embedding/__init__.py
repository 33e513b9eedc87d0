"""sentence-transformers' modules, losses and trainer on packed and sharded rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .packed_model import pack_embeddings as pack_embeddings
    from .packed_model import unpack_embeddings as unpack_embeddings
    from .span_loss import SpanRankingLoss as SpanRankingLoss
    from .spans import encode_spans as encode_spans
    from .tiled_ranking_loss import TiledMultipleNegativesRankingLoss as TiledMultipleNegativesRankingLoss
    from .trainer import LongContextSentenceTransformerTrainer as LongContextSentenceTransformerTrainer

_EXPORTS = {
    "packed_model": ("pack_embeddings", "unpack_embeddings"),
    "span_loss": ("SpanRankingLoss",),
    "spans": ("encode_spans",),
    "tiled_ranking_loss": ("TiledMultipleNegativesRankingLoss",),
    "trainer": ("LongContextSentenceTransformerTrainer",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

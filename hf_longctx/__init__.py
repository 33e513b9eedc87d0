"""hf_longctx: train transformers on long sequences, exactly or not at all.

Importing this package registers `attn_implementation="ulysses"` and `"packed"` with transformers and does nothing
else; the registration itself waits until transformers loads its models, so the import is cheap. Everything public is
listed below and loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .on_import import call_after_import


__version__ = "0.1.0"

_PUBLIC = {
    "LongContextConfig": ".config",
    "SequenceMesh": ".parallel.mesh",
    "SequenceShard": ".parallel.shard",
    "shard_batch": ".parallel.shard",
    "gather_sequence": ".parallel.collectives",
    "ShardCollator": ".data.collator",
    "PackingCollator": ".data.packing_collator",
    "PackedDataset": ".data.packed",
    "TokenBudgetSampler": ".data.token_budget",
    "assert_no_cross_document": ".attention.leaks",
    "explain_attention": ".attention.explain",
    "end_training": ".trainer.ending",
    "LongContextTrainer": ".trainer.causal_lm",
    "LongContextSFTTrainer": ".trainer.sft",
    "LongContextSentenceTransformerTrainer": ".trainer.embedding",
    "SpanRankingLoss": ".embedding.span_loss",
    "encode_spans": ".embedding.spans",
    "pack_embeddings": ".embedding.packing",
    "TiledMultipleNegativesRankingLoss": ".embedding.loss",
    "verify": ".proof.verify",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from .attention.explain import explain_attention  # noqa: F401
    from .attention.leaks import assert_no_cross_document  # noqa: F401
    from .config import LongContextConfig  # noqa: F401
    from .data.collator import ShardCollator  # noqa: F401
    from .data.packed import PackedDataset  # noqa: F401
    from .data.packing_collator import PackingCollator  # noqa: F401
    from .data.token_budget import TokenBudgetSampler  # noqa: F401
    from .embedding.loss import TiledMultipleNegativesRankingLoss  # noqa: F401
    from .embedding.packing import pack_embeddings  # noqa: F401
    from .embedding.span_loss import SpanRankingLoss  # noqa: F401
    from .embedding.spans import encode_spans  # noqa: F401
    from .parallel.collectives import gather_sequence  # noqa: F401
    from .parallel.mesh import SequenceMesh  # noqa: F401
    from .parallel.shard import SequenceShard, shard_batch  # noqa: F401
    from .proof.verify import verify  # noqa: F401
    from .trainer.causal_lm import LongContextTrainer  # noqa: F401
    from .trainer.embedding import LongContextSentenceTransformerTrainer  # noqa: F401
    from .trainer.ending import end_training  # noqa: F401
    from .trainer.sft import LongContextSFTTrainer  # noqa: F401


def _register_attention_names() -> None:
    from .attention.registry import register_attention_names

    register_attention_names()


call_after_import("transformers.modeling_utils", _register_attention_names)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

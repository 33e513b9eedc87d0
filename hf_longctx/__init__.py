"""hf_longctx: train transformers on long sequences, exactly or not at all.

Importing this package registers `attn_implementation="ulysses"`, `"packed"` and `"lsh"` with transformers and does
nothing else; the registration itself waits until transformers loads its models, so the import is cheap. Everything
public is listed below and loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .class_tables import wait_for_class_tables
from .lazy_exports import lazy_exports
from .on_import import call_after_import


__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters.axial_positions import AxialPositionEmbedding as AxialPositionEmbedding
    from .adapters.axial_positions import use_axial_positions as use_axial_positions
    from .adapters.embedding_norm import add_embedding_norm as add_embedding_norm
    from .adapters.hashed import use_lsh as use_lsh
    from .adapters.no_rotation import use_alibi as use_alibi
    from .adapters.reversible import make_reversible as make_reversible
    from .adapters.tied_query_key import tie_query_key as tie_query_key
    from .attention.contamination import assert_no_cross_document as assert_no_cross_document
    from .attention.explain import explain_attention as explain_attention
    from .attention.lsh import lsh_attention as lsh_attention
    from .config.indexer import IndexerConfig as IndexerConfig
    from .config.lsh_settings import LSHConfig as LSHConfig
    from .config.memory import MemoryConfig as MemoryConfig
    from .config.pair_rows import PreferenceConfig as PreferenceConfig
    from .config.ramp import RampConfig as RampConfig
    from .config.run import LongContextConfig as LongContextConfig
    from .config.sleep import SleepConfig as SleepConfig
    from .config.sleep import SleepWarmup as SleepWarmup
    from .config.sources import SourcesConfig as SourcesConfig
    from .config.test_time import TTTConfig as TTTConfig
    from .config.texts import TextsConfig as TextsConfig
    from .data.blend.blended_rows import BlendedRows as BlendedRows
    from .data.packing.collator import PackingCollator as PackingCollator
    from .data.packing.datasets import PackedDataset as PackedDataset
    from .data.packing.samplers import TokenBudgetSampler as TokenBudgetSampler
    from .data.shard_collator import ShardCollator as ShardCollator
    from .embedding.packed_model import pack_embeddings as pack_embeddings
    from .embedding.span_loss import SpanRankingLoss as SpanRankingLoss
    from .embedding.spans import encode_spans as encode_spans
    from .embedding.tiled_ranking_loss import TiledMultipleNegativesRankingLoss as TiledMultipleNegativesRankingLoss
    from .embedding.trainer import LongContextSentenceTransformerTrainer as LongContextSentenceTransformerTrainer
    from .parallel.collectives import gather_sequence as gather_sequence
    from .parallel.mesh import SequenceMesh as SequenceMesh
    from .parallel.shard import SequenceShard as SequenceShard
    from .parallel.shard import shard_batch as shard_batch
    from .proof.verification import verify as verify
    from .reporting.blend_report import BlendReport as BlendReport
    from .resilience.checkpoint_advisor import CheckpointAdvisor as CheckpointAdvisor
    from .resilience.kill_switch import KillSwitch as KillSwitch
    from .resilience.slow_rank_watch import SlowRankWatch as SlowRankWatch
    from .resilience.spike_guard import LossSpikeGuard as LossSpikeGuard
    from .sleep.generate import sleep_generate as sleep_generate
    from .sleep.hybridize import hybridize as hybridize
    from .sleep.loss import sleep_loss as sleep_loss
    from .trainer.adaptation import adapt as adapt
    from .trainer.causal_lm import LongContextTrainer as LongContextTrainer
    from .trainer.ending import end_training as end_training
    from .trainer.inner_warmup import InnerLearningRateWarmup as InnerLearningRateWarmup
    from .trainer.preference import LongContextDPOTrainer as LongContextDPOTrainer
    from .trainer.preference import LongContextKTOTrainer as LongContextKTOTrainer
    from .trainer.reward import LongContextRewardTrainer as LongContextRewardTrainer
    from .trainer.sft import LongContextSFTTrainer as LongContextSFTTrainer
    from .ttt.fast_cache import TTTCache as TTTCache
    from .ttt.fast_model import TTTForCausalLM as TTTForCausalLM

_EXPORTS = {
    "adapters.embedding_norm": ("add_embedding_norm",),
    "adapters.axial_positions": ("AxialPositionEmbedding", "use_axial_positions"),
    "adapters.no_rotation": ("use_alibi",),
    "adapters.reversible": ("make_reversible",),
    "adapters.hashed": ("use_lsh",),
    "adapters.tied_query_key": ("tie_query_key",),
    "attention.contamination": ("assert_no_cross_document",),
    "attention.explain": ("explain_attention",),
    "attention.lsh": ("lsh_attention",),
    "config.indexer": ("IndexerConfig",),
    "config.lsh_settings": ("LSHConfig",),
    "config.memory": ("MemoryConfig",),
    "config.pair_rows": ("PreferenceConfig",),
    "config.ramp": ("RampConfig",),
    "config.run": ("LongContextConfig",),
    "config.sleep": ("SleepConfig", "SleepWarmup"),
    "config.sources": ("SourcesConfig",),
    "config.test_time": ("TTTConfig",),
    "config.texts": ("TextsConfig",),
    "data.blend.blended_rows": ("BlendedRows",),
    "data.packing.collator": ("PackingCollator",),
    "data.packing.datasets": ("PackedDataset",),
    "data.packing.samplers": ("TokenBudgetSampler",),
    "data.shard_collator": ("ShardCollator",),
    "embedding.packed_model": ("pack_embeddings",),
    "embedding.span_loss": ("SpanRankingLoss",),
    "embedding.spans": ("encode_spans",),
    "embedding.tiled_ranking_loss": ("TiledMultipleNegativesRankingLoss",),
    "embedding.trainer": ("LongContextSentenceTransformerTrainer",),
    "parallel.collectives": ("gather_sequence",),
    "parallel.mesh": ("SequenceMesh",),
    "parallel.shard": (
        "SequenceShard",
        "shard_batch",
    ),
    "proof.verification": ("verify",),
    "reporting.blend_report": ("BlendReport",),
    "resilience.checkpoint_advisor": ("CheckpointAdvisor",),
    "resilience.kill_switch": ("KillSwitch",),
    "resilience.slow_rank_watch": ("SlowRankWatch",),
    "resilience.spike_guard": ("LossSpikeGuard",),
    "sleep.generate": ("sleep_generate",),
    "sleep.hybridize": ("hybridize",),
    "sleep.loss": ("sleep_loss",),
    "trainer.adaptation": ("adapt",),
    "trainer.causal_lm": ("LongContextTrainer",),
    "trainer.ending": ("end_training",),
    "trainer.inner_warmup": ("InnerLearningRateWarmup",),
    "trainer.preference": ("LongContextDPOTrainer", "LongContextKTOTrainer"),
    "trainer.reward": ("LongContextRewardTrainer",),
    "trainer.sft": ("LongContextSFTTrainer",),
    "ttt.fast_cache": ("TTTCache",),
    "ttt.fast_model": ("TTTForCausalLM",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)


def _register_attention_names() -> None:
    from .attention.names import register_attention_names

    register_attention_names()


call_after_import("transformers.modeling_utils", _register_attention_names)
wait_for_class_tables()

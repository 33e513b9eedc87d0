"""What the user wants: frozen dataclasses that are valid from the moment they exist, one for each audience."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .indexer import IndexerConfig as IndexerConfig
    from .lsh_settings import LSHConfig as LSHConfig
    from .memory import MemoryConfig as MemoryConfig
    from .pair_rows import PreferenceConfig as PreferenceConfig
    from .ramp import RampConfig as RampConfig
    from .run import LongContextConfig as LongContextConfig
    from .sleep import SleepConfig as SleepConfig
    from .sleep import SleepWarmup as SleepWarmup
    from .sources import SourcesConfig as SourcesConfig
    from .test_time import TTTConfig as TTTConfig
    from .texts import TextsConfig as TextsConfig
    from .watches import WatchConfig as WatchConfig

_EXPORTS = {
    "indexer": ("IndexerConfig",),
    "lsh_settings": ("LSHConfig",),
    "memory": ("MemoryConfig",),
    "pair_rows": ("PreferenceConfig",),
    "ramp": ("RampConfig",),
    "run": ("LongContextConfig",),
    "sleep": ("SleepConfig", "SleepWarmup"),
    "sources": ("SourcesConfig",),
    "test_time": ("TTTConfig",),
    "texts": ("TextsConfig",),
    "watches": ("WatchConfig",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

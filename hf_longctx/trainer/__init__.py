"""transformers' and TRL's trainers on sequences shared by several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .adaptation import adapt as adapt
    from .causal_lm import LongContextTrainer as LongContextTrainer
    from .ending import end_training as end_training
    from .preference import LongContextDPOTrainer as LongContextDPOTrainer
    from .preference import LongContextKTOTrainer as LongContextKTOTrainer
    from .reward import LongContextRewardTrainer as LongContextRewardTrainer
    from .sft import LongContextSFTTrainer as LongContextSFTTrainer

_EXPORTS = {
    "adaptation": ("adapt",),
    "causal_lm": ("LongContextTrainer",),
    "ending": ("end_training",),
    "preference": ("LongContextDPOTrainer", "LongContextKTOTrainer"),
    "reward": ("LongContextRewardTrainer",),
    "sft": ("LongContextSFTTrainer",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

"""transformers' and TRL's trainers on sequences shared by several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .causal_lm import LongContextTrainer as LongContextTrainer
    from .sft import LongContextSFTTrainer as LongContextSFTTrainer

_EXPORTS = {
    "causal_lm": ("LongContextTrainer",),
    "sft": ("LongContextSFTTrainer",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

"""Several documents in one row, without padding: lengths, bins, data sets, collator and samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .collator import PackingCollator as PackingCollator
    from .datasets import PackedDataset as PackedDataset
    from .datasets import PackedStream as PackedStream
    from .lengths import pack_lengths as pack_lengths
    from .samplers import BalancedSampler as BalancedSampler
    from .samplers import TokenBudgetSampler as TokenBudgetSampler

_EXPORTS = {
    "collator": ("PackingCollator",),
    "datasets": ("PackedDataset", "PackedStream"),
    "lengths": ("pack_lengths",),
    "samplers": ("BalancedSampler", "TokenBudgetSampler"),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

"""Is a number far above those before it? Median and median deviation of a window; arithmetic only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


_LEAST_DEVIATION = 1e-3  # of the median: where numbers hardly vary, rounding is no spike


def spike_threshold(window: Sequence[float], deviations: float) -> float:
    """The median of `window` plus `deviations` times the median of how far its numbers are from there."""
    median = statistics.median(window)
    deviation = statistics.median(abs(value - median) for value in window)
    return median + deviations * max(deviation, _LEAST_DEVIATION * abs(median))


def is_spike(value: float, window: Sequence[float], deviations: float) -> bool:
    """Whether `value` is above the threshold of `window`, or no number."""
    return math.isnan(value) or value > spike_threshold(window, deviations)

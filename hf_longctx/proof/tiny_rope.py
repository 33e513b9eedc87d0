"""Rotary settings of a tiny model: lists for its heads, and lengths at which frequencies change inside its rows."""

from __future__ import annotations

from collections.abc import Mapping

from ..families import LENGTH_ROPE_KINDS, POSITION_SCALE, ROPE_THRESHOLDS, rope_kind


HEAD_SIZE = 16
# A length at which some layer changes: not less than a rank's share of a tiny row, less than its longest documents.
THRESHOLD = 12


def shrink_rope(rope: Mapping, head_size: int) -> dict:
    """Rotary settings whose lists have one entry a pair of a head's numbers."""
    small = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            value = shrink_rope(value, head_size)
        elif name in ROPE_THRESHOLDS and isinstance(value, int) and _has_threshold(rope):
            value = min(value, THRESHOLD)
        elif name in ("short_factor", "long_factor") and isinstance(value, (list, tuple)):
            value = list(value)[: max(1, len(value) * HEAD_SIZE // max(head_size, HEAD_SIZE))]
        elif name == "mrope_section" and isinstance(value, (list, tuple)):
            value = _share(value, HEAD_SIZE // 2 * sum(value) * 2 // max(head_size, 1))
        small[name] = value
    return small


def _share(parts: list | tuple, total: int) -> list[int]:
    """`parts` scaled to whole numbers that sum to `total`."""
    scaled = [max(1, part * total // sum(parts)) for part in parts]
    scaled[0] += total - sum(scaled)
    return scaled


def scales_positions(values: Mapping) -> bool:
    return any(rope_kind(item) != "default" for item in _rope_settings(values))


def rotates_by_length(values: Mapping, *kinds: str) -> bool:
    """Whether rotary frequencies depend on the length, by these kinds or any."""
    return any(rope_kind(item) in (kinds or LENGTH_ROPE_KINDS) for item in _rope_settings(values))


def _has_threshold(rope: Mapping) -> bool:
    """Whether rotary settings name a length from which on something else is computed."""
    return rope_kind(rope) in LENGTH_ROPE_KINDS or any(POSITION_SCALE in name for name in rope)


def _rope_settings(values: Mapping) -> list[Mapping]:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return [rope, *(value for value in rope.values() if isinstance(value, Mapping))]

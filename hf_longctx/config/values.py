"""Checks of single values that several configs share."""

from __future__ import annotations

import math
from collections.abc import Sequence


def validate_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` ({value!r}) must be one of {', '.join(choices)}.")


def validate_tokens(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is `None` or a positive integer."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"`{name}` ({value!r}) must be a positive integer, a number of tokens, or unset.")


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

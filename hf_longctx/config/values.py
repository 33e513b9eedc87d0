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


def validate_count(name: str, value: object, of: str, least: int = 1) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `least`; `of` says what it counts."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` ({value!r}) must be a whole number of {of}, at least {least}.")


def validate_positive(name: str, value: object, what: str) -> None:
    """Raise `ValueError` unless `value` is a finite number above 0; `what` says of what."""
    if not is_number(value) or value <= 0:  # type: ignore[operator]
        raise ValueError(f"`{name}` ({value!r}) must be a finite number above 0: {what}.")


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and no truth value; an integer beyond double precision's is not finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False

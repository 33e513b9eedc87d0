"""One optimizer step that the loop takes and nothing does: optimizer, schedule and fp16's scale stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def hold_step(optimizer: Any, scheduler: Any, scaler: Any) -> Callable[[], None]:
    """Let `step()` of an optimizer and of a schedule do nothing.

    Args:
        optimizer: as the loop calls it.
        scheduler: likewise.
        scaler (`GradScaler`, *optional*): of fp16; what it noted about this step's gradients is forgotten.

    Returns:
        `Callable`: call it after the step to have both step again.
    """
    if scaler is not None and scaler.is_enabled():
        scaler.update(float(scaler.get_scale()))  # the same scale: nothing is learned from this step
    before = [(thing, vars(thing).get("step")) for thing in (optimizer, scheduler)]
    for thing, _ in before:
        thing.step = _do_nothing

    def release() -> None:
        for thing, own in before:
            if own is None:
                vars(thing).pop("step", None)
            else:
                thing.step = own

    return release


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None

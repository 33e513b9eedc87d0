"""What the watches of a long run have in common: callbacks that the trainers ask, all ranks alike."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import TrainerCallback

from .same_settings import validate_same_settings


Kind = TypeVar("Kind", bound="Watch")


class Watch(TrainerCallback):
    """A callback that takes part in decisions of all ranks, so that all must have it, with the same settings."""

    is_attached = False  # whether a trainer asks it

    def settings(self) -> dict[str, object]:
        """What ranks must agree on."""
        return {}

    def figures(self) -> dict[str, float]:
        """What the next training log gets."""
        return {}

    def refuse(self, trainer: Any) -> None:
        """Raise where this watch does not go with the run. Every rank comes here before the run starts."""


def watches_of(trainer: Any, kind: type[Kind]) -> list[Kind]:
    """The watches of a kind among a trainer's callbacks."""
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]


def attach_watches(trainer: Any) -> None:
    """Compare the watches of all ranks, and what each refuses, before a run.

    Raises:
        ValueError: ranks have other watches, or the same with other settings.

    Communication: one all-gather of 8 bytes.
    """
    watches = watches_of(trainer, Watch)
    settings: dict[str, object] = {}
    for watch in watches:
        name = type(watch).__name__
        while f"callbacks.{name}" in settings:
            name += "'"
        settings[f"callbacks.{name}"] = {"given": True, **watch.settings()}
        watch.is_attached = True
    validate_same_settings(settings, None, shares_rows=True)
    for watch in watches:
        watch.refuse(trainer)

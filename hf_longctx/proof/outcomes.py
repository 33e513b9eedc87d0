"""How a proof ends before numbers are compared, and what ranks say together."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from .result import REFUSED, WRONG, Errors
from .tiny import CannotShrink


_PACKAGE = str(Path(__file__).parents[1])
# Without the exchange the outputs must be this many times worse than the tolerance, or the comparison shows nothing.
SENSITIVE = 100.0


class Outcome(Exception):
    """Ends a proof before numbers were compared."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome, self.message = outcome, message


def attempt(step: Callable, attention: str = "", remedy: str = "set `sequence_parallel_size` to 1"):
    """Run a step of ours. What we say in a message is a refusal; any other error is a defect.

    Args:
        attention (`str`): transformers loads a model on this attention of ours; what it raises is its refusal.
        remedy (`str`): what to do then.
    """
    try:
        return step()
    except Outcome:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        said = isinstance(error, (NotImplementedError, ValueError, ImportError))
        if said and frames[-1].filename.startswith(_PACKAGE):
            raise Outcome(REFUSED, " ".join(str(error).split())) from error
        if attention:
            raise Outcome(
                REFUSED,
                f"transformers cannot load it with attn_implementation={attention!r} ({first_line(error)}), so it "
                f"does not use the attention interface: {remedy}.",
            ) from error
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        raise Outcome(WRONG, f"crashed instead of being refused: {first_line(error)} ({place})") from error


def worst_of_ranks(errors: Errors) -> Errors:
    """The worst of each number; every rank calls this."""
    if not dist.is_initialized():
        return errors
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, errors)
    values = {
        field.name: max((getattr(item, field.name) for item in everyone), key=lambda value: (value != value, value))
        for field in dataclasses.fields(Errors)
        if field.name != "parameter"
    }
    worst = max(everyone, key=lambda item: (item.gradient != item.gradient, item.gradient))
    return Errors(**values, parameter=worst.parameter)


def least_of_ranks(value: float) -> float:
    """The smallest value, so that all ranks decide alike; every rank calls this."""
    if not dist.is_initialized():
        return value
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return min(everyone)


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, CannotShrink):
        return str(error)
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    text = re.sub(r"/\S*/site-packages/", "", text)  # this text may be published
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "the folder", text)[:300]

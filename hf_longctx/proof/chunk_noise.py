"""How far one process is from itself: a recurrence that transformers computes in chunks, with chunks of another size.

Such functions cast to float32 inside, whatever the model's precision, so deciding a doubtful case in float64 leaves
their rounding where it was. A sum that cancels (the gradient of a decay) shows it most. What another chunk size
changes is nothing but rounding, and is measured on the model and the rows of the proof.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator

import torch

from ..adapters.rebind import called_names, rebind
from ..adapters.recurrent.layers import called_function


_SETTING = "chunk_size"


@contextlib.contextmanager
def other_chunks(model: torch.nn.Module) -> Iterator[bool]:
    """A block in which the model's recurrences run in chunks of a quarter of their size; whether it has any."""
    changed = []
    for module in model.modules():
        functions = _chunked(type(module).forward)
        if functions and "forward" not in vars(module):
            module.forward = rebind(type(module).forward, functions).__get__(module)
            changed.append(module)
    try:
        yield bool(changed)
    finally:
        for module in changed:
            del module.forward


def _chunked(forward: Callable) -> dict[str, Callable]:
    """By global name, what a forward calls that takes the size of a chunk, with smaller ones."""
    found: dict[str, Callable] = {}
    for name in called_names(forward):
        function = _global(forward, name)
        if inspect.isfunction(function) and _SETTING in inspect.signature(function).parameters:
            found[name] = functools.partial(_with_smaller_chunks, function)
    return found


def _global(forward: Callable, name: str) -> object:
    try:
        return called_function(forward, name)
    except KeyError:  # a builtin, or an attribute of that name
        return None


def _with_smaller_chunks(function: Callable, *args, **kwargs):
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    given.arguments[_SETTING] = max(1, given.arguments[_SETTING] // 4)
    return function(*given.args, **given.kwargs)

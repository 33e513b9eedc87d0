"""A module's own forward with some of the functions that it calls replaced, for one call.

What: transformers' layers call module-level functions (a convolution, a scan, a loss of the router) that know nothing
of other ranks or documents. [`rebind`] makes a function of the same code object in which those names mean something
else. No class and no module of transformers is changed, so two models in one process never meet.

How: the code is built into a new function over a copy of its globals. Decorators that transformers put on it (hooks of
accelerate, renamed arguments) are rebuilt around it. This happens at every call, so nothing has to be copied, pickled
or undone. Price: some microseconds a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch

from .instance_forward import InstancePatch


def rebind(function: Callable, replacements: Mapping[str, Callable]) -> Callable:
    """The same function, calling other functions under some of its global names.

    Args:
        function (`Callable`): a function of a class, bound or not, as it was written or decorated with
            `functools.wraps`, also on an instance.
        replacements (`Mapping[str, Callable]`): by global name, what it calls from now on.

    Returns:
        a new function; `function` stays as it is.

    Raises:
        NotImplementedError: it does not call a function of that name, or a decorator hides its code.
    """
    if isinstance(function, MethodType):
        return MethodType(rebind(function.__func__, replacements), function.__self__)
    if not isinstance(function, FunctionType):
        raise NotImplementedError(
            f"`forward` is a `{type(function).__name__}` here and no function of transformers, so what it calls "
            "cannot be replaced: attach the adapters before other tools (offloading hooks, compilers) wrap this layer."
        )
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        missing = sorted(set(replacements) - called_names(function))
        if missing:
            raise NotImplementedError(
                f"`{function.__qualname__}` does not call {', '.join(f'`{name}`' for name in missing)} in this "
                "version of transformers: install one that setup.py names, or set `sequence_parallel_size` to 1."
            )
        return _copy(function, {**function.__globals__, **replacements}, function.__closure__)
    rebuilt, found = rebind(inner, replacements), False
    cells = []
    for cell in function.__closure__ or ():
        holds = _content(cell) is inner
        found |= holds
        cells.append(CellType(rebuilt) if holds else cell)
    if not found:
        raise NotImplementedError(
            f"a decorator of `{function.__qualname__}` keeps the function that it calls where it cannot be replaced: "
            "install a version of transformers that setup.py names, or set `sequence_parallel_size` to 1."
        )
    copied = _copy(function, function.__globals__, tuple(cells))
    copied.__dict__["__wrapped__"] = rebuilt
    return copied


def called_names(function: Any) -> set[str]:
    """The global names that a function uses, under the decorators that `functools.wraps` shows."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set(code.co_names) if code is not None else set()


class RebindPatch(InstancePatch):
    """A forward that calls other functions; lies below every other patch of its module."""

    lowest = True

    def replacements(self, module: torch.nn.Module, given: dict[str, Any]) -> Mapping[str, Callable]:
        """By global name, what this call uses; empty to run the forward as it is.

        Args:
            module (`torch.nn.Module`): the instance.
            given (`dict`): the arguments of the call by name.
        """
        raise NotImplementedError

    def run(self, module: torch.nn.Module, own: Callable, replacements: Mapping[str, Callable], args, kwargs):
        """Call the forward of the class with these replacements."""
        if not replacements:
            return own(*args, **kwargs)
        return _run_rebound(own, replacements, *args, **kwargs)


@torch.compiler.disable
def _run_rebound(own: Callable, replacements: Mapping[str, Callable], *args, **kwargs):
    """Never traced: a compiler puts names of its own into the globals of the code that it compiled once, and finds
    other globals here the next time."""
    return rebind(own, replacements)(*args, **kwargs)


def _copy(function: FunctionType, names: dict[str, Any], closure: tuple | None) -> FunctionType:
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
    copied.__dict__.update(function.__dict__)
    return copied


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was ever put into it
        return None

"""A layer of transformers taken apart into its two half-layers: attention with its norms, MLP with its norms.

How: no names. The layer's own forward runs once on a few tokens and its children are watched: the half-layers meet
where a child is given exactly the input of the layer plus what an earlier child returned. A half-layer by itself is
then the layer's own forward in which the children of the other half return -0.0, which changes no number that it is
added to. Both halves by themselves must give the layer's own numbers to the bit, dropout included, or it is refused.

Price: at construction three forwards of a layer on a few tokens; later one pass over a tensor of zeros a half-layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


# What some layers multiply the outputs of their halves with, as Granite does.
_MULTIPLIER = "residual_multiplier"


@dataclass(frozen=True)
class HalfLayers:
    """How one layer is run by halves.

    Args:
        first, second (`tuple`): the names of the children of each half, in the order in which they run.
        others (`int`, *optional*): how many values a child or the layer returns behind its tokens, by name (`""` for
            the layer); a name is missing where the tokens come alone.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    others: dict[str, int]

    def run(self, half: int, layer: torch.nn.Module, own: Callable, tokens: torch.Tensor, args, kwargs):
        """What half-layer 0 or 1 adds to the other stream, for its input `tokens`.

        Args:
            half (`int`): which.
            layer (`torch.nn.Module`): the layer.
            own (`Callable`): its own forward.
            tokens (`torch.Tensor` of shape `(B, t, D)`): its input.
            args, kwargs: further arguments of the layer.
        """
        runs, rests = (self.first, self.second) if half == 0 else (self.second, self.first)
        with self._silent(layer, rests, tokens), _last_output(layer, runs[-1]) as outputs:
            own(tokens, *args, **kwargs)
        output = tokens_of(outputs[0])
        multiplier = getattr(layer, _MULTIPLIER, None)
        return output if multiplier is None else output * multiplier

    def answer(self, name: str, tokens: torch.Tensor) -> Any:
        """`tokens` in the form in which the child of that name returns them, or the layer (`""`)."""
        return (tokens, *[None] * self.others[name]) if name in self.others else tokens

    @contextlib.contextmanager
    def _silent(self, layer: torch.nn.Module, names: tuple[str, ...], tokens: torch.Tensor) -> Iterator[None]:
        nothing = torch.full((), -0.0, dtype=tokens.dtype, device=tokens.device).expand(tokens.shape)
        before = []
        for name in names:
            child = vars(getattr(layer, name))
            before.append((child, child.get("forward")))
            child["forward"] = _Silent(self.answer(name, nothing))
        try:
            yield
        finally:
            for child, forward in before:
                child.pop("forward")
                if forward is not None:
                    child["forward"] = forward


class _Silent:
    """A forward that computes nothing."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self.answer


@dataclass
class _Call:
    name: str
    given: tuple[torch.Tensor, ...]
    output: Any


def take_apart(layer: torch.nn.Module, own: Callable, tokens: torch.Tensor, args, kwargs) -> tuple[HalfLayers, Any]:
    """Find the two half-layers of `layer` by running it, and prove them.

    Args:
        layer (`torch.nn.Module`): a layer with weights, in the mode in which it will run.
        own (`Callable`): its own forward.
        tokens (`torch.Tensor` of shape `(B, t, D)`): its input.
        args, kwargs: further arguments of the layer.

    Returns:
        tuple of [`HalfLayers`] and what the layer returned.

    Raises:
        NotImplementedError: it is not `x + f(x)`, followed by `y + g(y)`, to the bit.
    """
    own_parameters = _named(tuple(name for name, parameter in layer._parameters.items() if parameter is not None))
    if own_parameters:
        raise NotImplementedError(
            f"`{type(layer).__name__}` learns {own_parameters} outside of its parts, which could scale what its "
            "halves are added to: it cannot run in two streams; train this model with activation checkpointing."
        )
    state = _random_state(tokens)
    with _watched(layer) as calls:
        returned = own(tokens, *args, **kwargs)
    after = _random_state(tokens)
    halves, middle = _split(layer, tokens, calls, returned)
    _restore(state, tokens)
    first = halves.run(0, layer, own, tokens, args, kwargs)
    second = halves.run(1, layer, own, middle, args, kwargs)
    result = tokens_of(returned)
    same = torch.equal(tokens + first, middle) and torch.equal(middle + second, result)
    if not same or not all(map(torch.equal, after, _random_state(tokens))):
        raise NotImplementedError(
            f"`{type(layer).__name__}` is not the sum of its halves {_named(halves.first)} and "
            f"{_named(halves.second)}: by themselves they give other numbers than its own forward, so its input "
            "cannot be computed from its output; train this model with activation checkpointing."
        )
    return halves, returned


def _split(layer: torch.nn.Module, tokens: torch.Tensor, calls: list[_Call], returned: Any):
    """The halves, and what lies between them."""
    kind, result = type(layer).__name__, tokens_of(returned)
    multiplier = getattr(layer, _MULTIPLIER, None)
    others = {"": _others(returned)} | {call.name: _others(call.output) for call in calls}
    if any(isinstance(value, torch.Tensor) for value in (returned[1:] if isinstance(returned, tuple) else ())):
        raise NotImplementedError(
            f"`{kind}` returns more tensors than its tokens, which the next layer or a loss would need: it cannot run "
            "in two streams; train this model with activation checkpointing."
        )
    outputs = [_scaled(tokens_of(call.output), multiplier) for call in calls]
    for index in range(len(calls) - 1):
        if not _fits(outputs[index], tokens) or not _fits(outputs[-1], tokens):
            continue
        middle = tokens + outputs[index]
        meets = any(_same(value, middle) for value in calls[index + 1].given)
        if meets and _same(middle + outputs[-1], result):
            first, second = (tuple(call.name for call in part) for part in (calls[: index + 1], calls[index + 1 :]))
            if not set(first) & set(second):
                return HalfLayers(first, second, {k: v for k, v in others.items() if v is not None}), middle
    ran = _named(tuple(call.name for call in calls)) or "no module"
    raise NotImplementedError(
        f"`{kind}` runs {ran} and is not `x + f(x)` followed by `y + g(y)`, so it has no two half-layers for two "
        "streams (its parts run side by side, are normalized after the sum, or it has one part only); train this "
        "model with activation checkpointing."
    )


def tokens_of(output: Any) -> Any:
    """The tokens among what a module returned."""
    return output[0] if isinstance(output, tuple | list) and output else output


def _others(output: Any) -> int | None:
    return len(output) - 1 if isinstance(output, tuple | list) else None


def _fits(output: Any, tokens: torch.Tensor) -> bool:
    return isinstance(output, torch.Tensor) and output.shape == tokens.shape and output.is_floating_point()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _scaled(output: Any, multiplier: float | None) -> Any:
    return output if multiplier is None or not isinstance(output, torch.Tensor) else output * multiplier


def _named(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@contextlib.contextmanager
def _watched(layer: torch.nn.Module) -> Iterator[list[_Call]]:
    """The calls of the layer's children within the block."""
    calls: list[_Call] = []

    def note(name: str) -> Callable:
        def hook(module, args, kwargs, output):
            given = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            calls.append(_Call(name, given, output))

        return hook

    hooks = [child.register_forward_hook(note(name), with_kwargs=True) for name, child in layer.named_children()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _last_output(layer: torch.nn.Module, name: str) -> Iterator[list[Any]]:
    """What the child of that name returned within the block."""
    outputs: list[Any] = []

    def keep(module: torch.nn.Module, args: tuple, output: Any) -> None:
        outputs.append(output)

    hook = getattr(layer, name).register_forward_hook(keep)
    try:
        yield outputs
    finally:
        hook.remove()


def _random_state(tokens: torch.Tensor) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(tokens.device)] if tokens.is_cuda else [])]


def _restore(state: list[torch.Tensor], tokens: torch.Tensor) -> None:
    torch.set_rng_state(state[0])
    if tokens.is_cuda:
        torch.cuda.set_rng_state(state[1], tokens.device)

"""Run a function of tokens tile by tile, keep its input only, and run the tiles once more in backward.

Two autograd nodes. The first keeps the input and does nothing else; the second runs the tiles and saves nothing. When
a checkpoint recomputes what led here, it is done as soon as the first node has its tensor, before any tile runs. In
backward the second node asks the first for the input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states


@dataclass(frozen=True)
class Tiles:
    """A function that treats each token by itself, and how many tokens it gets at once.

    Args:
        name (`str`): for messages.
        function (`Callable`): tokens `(..., T, D)` and parameters by name to tokens of the same shape.
        size (`int`): tokens of a row in one tile.
    """

    name: str
    function: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
    size: int

    def slices(self, num_tokens: int) -> list[slice]:
        """Where the tiles are in a row; a row without tokens is one tile."""
        return [slice(start, start + self.size) for start in range(0, max(num_tokens, 1), self.size)]

    def run(self, hidden_states: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """All tiles, one after the other, into one output."""
        slices, output = self.slices(hidden_states.shape[-2]), None
        if len(slices) == 1:
            return self.function(hidden_states, parameters)
        for tile in slices:
            piece = self.function(hidden_states[..., tile, :].contiguous(), parameters)
            if output is None:
                output = piece.new_empty((*hidden_states.shape[:-1], piece.shape[-1]))
            output[..., tile, :] = piece
        return output


def run_and_recompute(tiles: Tiles, hidden_states: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run all tiles now, and again in backward.

    Args:
        tiles ([`Tiles`]): the function.
        hidden_states (`torch.Tensor` of shape `(..., T, D)`): all tokens.
        parameters (`dict`): what the function learns, by name; it may be empty if `hidden_states` needs a gradient.

    Gradient: that of the function; one for each parameter, added up over tiles, in fp32 for half precision.
    Memory: saves `hidden_states`.
    """
    needs_input = hidden_states.requires_grad
    # A leaf of its own if nothing before it learns: the node that keeps the input exists in any case.
    kept = _KeepInput.apply(hidden_states if needs_input else hidden_states.detach().requires_grad_())
    return _RunTiles.apply(tiles, kept.grad_fn, needs_input, tuple(parameters), kept, *parameters.values())


class _KeepInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states):
        ctx.save_for_backward(hidden_states)
        ctx.set_materialize_grads(False)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad


class _RunTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiles: Tiles, kept_by, needs_input: bool, names: tuple[str, ...], hidden_states, *parameters):
        ctx.tiles, ctx.kept_by, ctx.needs_input, ctx.names = tiles, kept_by, needs_input, names
        # Not saved: a hook may move or recompute what is saved, and under FSDP2 these come back by themselves.
        ctx.parameters, ctx.versions = parameters, [p._version for p in parameters]
        ctx.autocast = autocast_state(hidden_states.device.type)
        before = random_states(hidden_states)
        # Detached leaf copies, so that autocast caches no cast without a graph for the parameters themselves.
        output = tiles.run(hidden_states.detach(), dict(zip(names, detached_leaves(parameters))))
        drew = not all(map(torch.equal, before, random_states(hidden_states)))
        ctx.random_states = before if drew else None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if ctx.versions != [p._version for p in ctx.parameters]:
            raise RuntimeError(
                f"a parameter of `{ctx.tiles.name}` was changed in place between forward and backward, so its tiles "
                "cannot be run again: step the optimizer after backward."
            )
        (hidden_states,) = ctx.kept_by.saved_tensors
        leaves = detached_leaves(ctx.parameters)
        sums = [None] * len(leaves)
        grad_input = torch.empty_like(hidden_states) if ctx.needs_input else None
        with replay_random(ctx.random_states, hidden_states), autocast_as(ctx.autocast):
            for tile in ctx.tiles.slices(hidden_states.shape[-2]):
                tokens = hidden_states[..., tile, :].detach().contiguous().requires_grad_(ctx.needs_input)
                with torch.enable_grad():  # a view has a node, which hooks of modules inside may ask for
                    output = ctx.tiles.function(tokens.view_as(tokens), dict(zip(ctx.names, leaves)))
                inputs = [tokens, *leaves] if ctx.needs_input else leaves
                with autocast_as(ctx.autocast, enabled=False):  # as any backward; inside, so casts of weights are kept
                    grads = list(torch.autograd.grad(output, inputs, grad_output[..., tile, :], allow_unused=True))
                if ctx.needs_input:
                    grad_input[..., tile, :] = grads.pop(0)
                sums = [_add(total, grad) for total, grad in zip(sums, grads)]
        sums = [total if total is None else total.to(leaf.dtype) for total, leaf in zip(sums, leaves)]
        return None, None, None, None, grad_input, *sums


def detached_leaves(parameters: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Detached leaf copies, so that parameter hooks fire once per backward and not once per tile."""
    return [parameter.detach().requires_grad_() for parameter in parameters]


def _add(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    if grad is None:
        return total
    if total is not None:
        return total.add_(grad)
    wide = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
    return grad.to(wide, copy=True)  # a gradient may share memory with what it came from


def random_states(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *get_device_states(tensor)[1]]


@contextlib.contextmanager
def replay_random(states: list[torch.Tensor] | None, tensor: torch.Tensor) -> Iterator[None]:
    """Draw the random numbers of the forward once more, tile by tile in its order; other generators stay."""
    if states is None:
        yield
        return
    devices, _ = get_device_states(tensor)
    kind = tensor.device.type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind):
        torch.set_rng_state(states[0])
        set_device_states(devices, states[1:], device_type=kind)
        yield


def autocast_state(device_type: str) -> dict[str, object] | None:
    if not torch.amp.is_autocast_available(device_type):
        return None
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


def autocast_as(state: dict[str, object] | None, **changes: object):
    return contextlib.nullcontext() if state is None else torch.autocast(**{**state, **changes})

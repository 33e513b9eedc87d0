"""Recomputation of a body that takes gradients of its own: forward keeps its inputs, backward runs it again.

`torch.utils.checkpoint` does not do here. Its non-reentrant form runs a chunk twice in forward already, as the inner
gradient unpacks what was dropped; its reentrant form adds to `.grad` itself, which DDP counts as a second use of a
parameter. This function takes parameters as inputs and returns their gradients, so autograd sums them as it does
everywhere. Bodies may hold further ones: two levels keep about `2 sqrt(n)` states instead of `n`.
Price: one more run of the body a level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


Body = Callable[..., tuple[torch.Tensor, ...]]


@contextlib.contextmanager
def plain_autocast(device: torch.device, state: tuple[bool, torch.dtype] | None = None) -> Iterator[None]:
    """Autocast as it is, or as it was, without its cache: weights cast under `no_grad` would lose their gradient."""
    enabled, dtype = autocast_state(device) if state is None else state
    with torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False):
        yield


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for a kind of device, and in which precision."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def run_again_in_backward(
    body: Body, tensors: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """`body(*tensors)`, whose graph is not kept.

    Args:
        body (`Callable`): tensors to a tuple of tensors. It reads `parameters` by itself. Where gradients are off, its
            outputs must have no graph.
        tensors (`list` of `torch.Tensor`): its inputs.
        parameters (`list` of `torch.Tensor`): leaves that it reads and that are trained.
    """
    return _RunAgain.apply(body, len(tensors), *tensors, *parameters)


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, body: Body, count: int, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        tensors, ctx.parameters, ctx.body = given[:count], given[count:], body
        ctx.device = tensors[0].device
        ctx.autocast, ctx.random = autocast_state(ctx.device), _random_state(ctx.device)
        ctx.needs = [tensor.requires_grad for tensor in tensors]
        outputs = body(*tensors)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "`create_graph=True` asks for a gradient of gradients, and recomputed chunks keep no graph of theirs: "
                "leave `gradient_checkpointing` off for such a loss."
            )
        tensors = [
            tensor.detach().requires_grad_(needs) for tensor, needs in zip(ctx.saved_tensors, ctx.needs, strict=True)
        ]
        devices = [ctx.device] if ctx.device.type != "cpu" else []
        fork = torch.random.fork_rng(devices, device_type=ctx.device.type if devices else "cuda")
        with fork, torch.enable_grad(), plain_autocast(ctx.device, ctx.autocast):
            _set_random_state(ctx.device, ctx.random)
            outputs = ctx.body(*tensors)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
            inputs = [tensor for tensor in (*tensors, *ctx.parameters) if tensor.requires_grad]
            found = _gradients(pairs, inputs)
        given = (*tensors, *ctx.parameters)
        return None, None, *(next(found) if tensor.requires_grad else None for tensor in given)


def _gradients(pairs: list, inputs: list[torch.Tensor]) -> Iterator[torch.Tensor | None]:
    if not pairs or not inputs:
        return iter([None] * len(inputs))
    outputs, gradients = zip(*pairs)
    return iter(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    kind = getattr(torch, device.type)
    return torch.get_rng_state(), None if device.type == "cpu" else kind.get_rng_state(device)


def _set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        getattr(torch, device.type).set_rng_state(state[1], device)

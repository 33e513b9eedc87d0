"""A stack of layers on two streams, whose inputs are computed from its outputs in backward instead of being kept.

What: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)` for each layer, with `f` and `g` its half-layers; both streams start as the
hidden states, and their mean is the output. Backward has `y1`, `y2` and computes `x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`.

How: the streams are float64, the layers run in the model's dtype. A sum of numbers of 8 or 24 bits is exact in
float64 unless one is below 2e-9 of the other; so what a layer reads in backward is what it read in forward, to the
bit. A sum over the bits of the first inputs proves it in every backward. Random states are kept for each half-layer
that draws. Gradients of parameters are returned, one a parameter, so that the hooks of DDP and FSDP2 fire once.
Price: one more forward of every layer. Memory: two streams of `B x t x D` float64 between forward and backward, with
any number of layers, and four more while backward runs; gradients of all parameters of the stack arrive together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map

from .half_layers import HalfLayers
from .pass_shard import rows_passed, shard_readers
from .recompute import autocast_as, autocast_state, detached_leaves, random_states, replay_random


@dataclass
class LayerCall:
    """One layer of the stack and how the model called it.

    Args:
        layer (`torch.nn.Module`): the layer.
        own (`Callable`): its own forward.
        halves ([`HalfLayers`]): how it is run by halves.
        args, kwargs: its arguments without its tokens.
        states (`list`): random states before each half, where it drew.
    """

    layer: torch.nn.Module
    own: Callable
    halves: HalfLayers
    args: tuple
    kwargs: dict[str, Any]
    states: list[list[torch.Tensor] | None] = field(default_factory=lambda: [None, None])


def run_two_streams(calls: list[LayerCall], hidden_states: torch.Tensor) -> torch.Tensor:
    """Run all layers on two streams.

    Args:
        calls (`list` of [`LayerCall`]): in order.
        hidden_states (`torch.Tensor` of shape `(B, t, D)`): what the first layer is given.

    Returns:
        `torch.Tensor` of the same shape and dtype: the mean of both streams.

    Raises:
        NotImplementedError: a layer changes its buffers or what it was called with, so it cannot run twice.
    """
    tensors = _differentiable(calls)
    if torch.is_grad_enabled() and (hidden_states.requires_grad or tensors):
        return _TwoStreams.apply(_Job(calls, tensors), hidden_states, *tensors)
    with torch.no_grad():
        return _Job(calls, []).forward(hidden_states)[0]


class _Job:
    """The stack of one forward; `tensors` are the parameters and arguments that get gradients."""

    def __init__(self, calls: list[LayerCall], tensors: list[torch.Tensor]) -> None:
        self.calls, self.tensors = calls, tensors
        self.places = {id(tensor): place for place, tensor in enumerate(tensors)}
        self.names = [
            {name: self.places[id(p)] for name, p in call.layer.named_parameters() if id(p) in self.places}
            for call in calls
        ]

    def forward(self, hidden_states: torch.Tensor, keeps_states: bool = False) -> tuple[torch.Tensor, ...]:
        """The output and both streams at the end."""
        one, two = hidden_states.double(), hidden_states.double()
        if one is two or one.data_ptr() == hidden_states.data_ptr():  # float64 layers
            one, two = one.clone(), two.clone()
        for call in self.calls:
            for half in (0, 1):
                before = random_states(hidden_states) if keeps_states else None
                added = call.halves.run(
                    half, call.layer, call.own, two.to(hidden_states.dtype), call.args, call.kwargs
                )
                if before is not None and not all(map(torch.equal, before, random_states(hidden_states))):
                    call.states[half] = before
                one, two = two, one.add_(added)
        return ((one + two) * 0.5).to(hidden_states.dtype), one, two

    def run_half(
        self, index: int, half: int, tokens: torch.Tensor, leaves: list[torch.Tensor], autocast: dict[str, Any] | None
    ) -> torch.Tensor:
        """One half-layer with a graph, as in forward, with `leaves` in place of `tensors`."""
        call = self.calls[index]
        args, kwargs = tree_map(self._swap(leaves), (call.args, call.kwargs))
        parameters = {f"layer.{name}": leaves[place] for name, place in self.names[index].items()}
        runner = _Runner(call, half)
        with replay_random(call.states[half], tokens), autocast_as(autocast), torch.enable_grad():
            # A view has a node, which hooks of modules inside may ask for.
            return torch.func.functional_call(runner, parameters, (tokens.view_as(tokens), args, kwargs))

    def _swap(self, leaves: list[torch.Tensor]) -> Callable:
        def swap(value: Any) -> Any:
            return leaves[self.places[id(value)]] if id(value) in self.places else value

        return swap


class _Runner(torch.nn.Module):
    """Wrapper module through which `functional_call` reaches what is below the patch."""

    def __init__(self, call: LayerCall, half: int) -> None:
        super().__init__()
        self.layer, self.call, self.half = call.layer, call, half

    def forward(self, tokens: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return self.call.halves.run(self.half, self.layer, self.call.own, tokens, args, kwargs)


class _TwoStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job: _Job, hidden_states: torch.Tensor, *tensors: torch.Tensor):
        ctx.job, ctx.dtype, ctx.used = job, hidden_states.dtype, False
        ctx.autocast = autocast_state(hidden_states.device.type)
        ctx.versions, ctx.start = [t._version for t in tensors], _fingerprint(hidden_states)
        ctx.readers = [reader for call in job.calls for reader in shard_readers(call.layer)]
        ctx.rows = [reader.rows for reader in ctx.readers]
        before, given = _buffers(job), _containers(job)
        # No cache of casts: it would hold casts without a graph for weights that somebody else uses later.
        with autocast_as(ctx.autocast, cache_enabled=False):
            output, one, two = job.forward(hidden_states, keeps_states=True)
        _validate_unchanged(job, before, given)
        ctx.save_for_backward(one, two)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        job: _Job = ctx.job
        _validate_first(ctx, job)
        # Not the saved tensors themselves, whose versions torch would count: they are overwritten, to hold only two.
        one, two = (stream.data for stream in ctx.saved_tensors)
        grad_one = grad_output.double() * 0.5
        grad_two = grad_one.clone()
        leaves = detached_leaves(tuple(job.tensors))
        sums: list[torch.Tensor | None] = [None] * len(leaves)
        autocast = None if ctx.autocast is None else {**ctx.autocast, "cache_enabled": False}
        with contextlib.ExitStack() as stack:
            for reader, rows in zip(ctx.readers, ctx.rows):
                stack.enter_context(rows_passed([reader], rows))
            if ctx.autocast is not None:  # as any backward
                stack.enter_context(autocast_as(ctx.autocast, enabled=False))
            for index in reversed(range(len(job.calls))):
                for half in (1, 0):
                    # `two` is what this half added to, `one` is what it read.
                    tokens = one.to(ctx.dtype, copy=True).requires_grad_()
                    added = job.run_half(index, half, tokens, leaves, autocast)
                    used = sorted(_used(job, index))
                    wanted = [tokens, *(leaves[place] for place in used)]
                    grads = torch.autograd.grad(added, wanted, grad_two.to(added.dtype, copy=True), allow_unused=True)
                    one, two = two.sub_(added.detach()), one
                    if grads[0] is not None:
                        grad_one.add_(grads[0])
                    grad_one, grad_two = grad_two, grad_one
                    for place, grad in zip(used, grads[1:]):
                        if grad is not None:
                            sums[place] = grad if sums[place] is None else sums[place] + grad
                    del tokens, added, wanted, grads
        _validate_inputs(ctx, one, two)
        grad = grad_one.add_(grad_two).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return None, grad, *sums


def _used(job: _Job, index: int) -> set[int]:
    """The places of the tensors that a layer could give gradients to."""
    call = job.calls[index]
    arguments = {
        job.places[id(value)] for value in tree_flatten((call.args, call.kwargs))[0] if id(value) in job.places
    }
    return set(job.names[index].values()) | arguments


def _differentiable(calls: list[LayerCall]) -> list[torch.Tensor]:
    """Every parameter of the layers and every tensor among their arguments that wants a gradient, once."""
    found: dict[int, torch.Tensor] = {}
    for call in calls:
        given = tree_flatten((call.args, call.kwargs))[0]
        for value in (*call.layer.parameters(), *given):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found.setdefault(id(value), value)
    return list(found.values())


def _fingerprint(tokens: torch.Tensor) -> torch.Tensor:
    """A sum over the bits of `tokens`; in float64, whose sums are rounded, over their numbers."""
    tokens = tokens.detach().contiguous() + 0.0  # -0.0, which dropout makes, comes back as 0.0
    if tokens.dtype == torch.float64:
        return torch.stack((tokens.sum(), tokens.abs().sum()))
    return tokens.view(torch.int32 if tokens.element_size() == 4 else torch.int16).sum(dtype=torch.int64)


def _buffers(job: _Job) -> list[tuple[int, int]]:
    return [(id(buffer), buffer._version) for call in job.calls for buffer in call.layer.buffers()]


def _containers(job: _Job) -> list[tuple[int, int]]:
    """What dicts and lists among the arguments hold."""
    leaves = tree_flatten([(call.args, call.kwargs) for call in job.calls])[0]
    return [(id(leaf), leaf._version if isinstance(leaf, torch.Tensor) else 0) for leaf in leaves]


def _validate_unchanged(job: _Job, buffers: list, given: list) -> None:
    name = type(job.calls[0].layer).__name__
    if buffers != _buffers(job):
        raise NotImplementedError(
            f"`{name}` changes one of its buffers while it runs, which it would do a second time in backward: it "
            "cannot run in two streams; train this model with activation checkpointing."
        )
    if given != _containers(job):
        raise NotImplementedError(
            f"`{name}` hands something to later layers through its arguments, whose gradient would be lost in two "
            "streams: train this model with activation checkpointing."
        )


def _validate_first(ctx, job: _Job) -> None:
    if ctx.used:
        raise RuntimeError(
            "backward ran through the layers in two streams before, which overwrites what it starts from: run the "
            "forward again instead of setting `retain_graph`."
        )
    ctx.used = True
    if ctx.versions != [tensor._version for tensor in job.tensors]:
        raise RuntimeError(
            "a parameter of the layers in two streams was changed in place between forward and backward, so their "
            "inputs cannot be computed again: step the optimizer after backward."
        )


def _validate_inputs(ctx, one: torch.Tensor, two: torch.Tensor) -> None:
    """Raise `RuntimeError` unless backward arrived at what forward started from."""
    for stream in (one, two):
        found = _fingerprint(stream.to(ctx.dtype))
        rounded = ctx.dtype == torch.float64
        same = torch.allclose(found, ctx.start, 1e-6, float(ctx.start[1]) * 1e-9) if rounded else found == ctx.start
        if not same and bool(stream.isfinite().all()):
            raise RuntimeError(
                "the layers gave other numbers in backward than in forward, so the gradients of two streams would be "
                "wrong: their kernels are not deterministic (`torch.use_deterministic_algorithms(True)` names them), "
                "or they draw from a random generator of their own."
            )

"""How long a rank computes, without its waits for others: forward, backward and optimizer, less exchanges inside.

A step takes every rank as long as the slowest one. What of it is a rank's own: the forward and the backward, less the
exchanges of shared rows, which a [`Stopwatch`] takes out, and what the optimizer computes. DDP exchanges gradients
while a backward runs and waits for them behind its last node, where this one has ended. Under FSDP2, which gathers
weights between layers, only the forward inside the layers can be told apart from waiting, and nothing else counts.
Price: two clock reads a part, or two events on a GPU's stream, and the stopwatch where rows are shared.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ..adapters.wrapped import unwrap
from ..parallel.stopwatch import Stopwatch


class OwnSeconds:
    """Times the steps of a model in training.

    Args:
        model (`torch.nn.Module`): wrapped or not; hooks are put on it.
        device (`torch.device`): on CUDA, events are read once they have passed, and nothing waits.
        clock (`Callable`, *optional*): seconds, in place of all that.
        optimizer (`torch.optim.Optimizer`, *optional*):
            Its steps and the backward count as well. Leave it out where either waits for other ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        clock: Callable[[], float] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._uses_events = clock is None and device.type == "cuda"
        self._clock = clock or time.perf_counter
        self._seconds, self._is_inside = 0.0, False
        self._exchange: Stopwatch | None = None
        self._begun: list[Any] = []
        self._pending: list[tuple[Any, Any]] = []
        self._stopwatches: list[Stopwatch] = []
        self._times_backward = optimizer is not None
        whole = unwrap(model) if not isinstance(model, FSDPModule) else model
        self._hooks = [whole.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for part in timed_parts(whole):
            self._hooks += [part.register_forward_pre_hook(self._begin), part.register_forward_hook(self._end)]
        self._hooks.append(whole.register_forward_hook(self._leave, always_call=True))  # after the model's own end
        if optimizer is not None:
            begun: list[Any] = []
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_: begun.append(self._now())))
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._add(begun.pop())))

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def take(self) -> float:
        """Seconds since the last call. On CUDA the CPU waits for the last of them."""
        if self._pending:
            self._pending[-1][1].synchronize()
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._pending) / 1000
        seconds -= sum(stopwatch.take() for stopwatch in self._stopwatches)
        self._seconds, self._pending, self._stopwatches = 0.0, [], []
        return seconds

    def _now(self) -> Any:
        if not self._uses_events:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, module: torch.nn.Module, args: tuple, batch: dict[str, Any]) -> tuple | None:
        self._is_inside = module.training and torch.is_grad_enabled()
        shard = batch.get("sequence_shard")
        if not self._is_inside or shard is None or shard.size == 1:
            return None
        self._exchange = Stopwatch(
            clock=None if self._uses_events else self._clock,
            also=() if shard.stopwatch is None else (shard.stopwatch,),
        )
        self._stopwatches.append(self._exchange)
        return args, {**batch, "sequence_shard": dataclasses.replace(shard, stopwatch=self._exchange)}

    def _leave(self, module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        was_inside, exchange = self._is_inside, self._exchange
        self._is_inside, self._begun, self._exchange = False, [], None
        if exchange is not None:
            exchange.is_on = False  # between forward and backward nothing is timed
        if was_inside and self._times_backward:
            self._time_backward(output, exchange)

    def _time_backward(self, output: Any, exchange: Stopwatch | None) -> None:
        """From the first gradient of an output to the last node of the backward."""
        begun: list[Any] = []

        def begin(_: torch.Tensor) -> None:
            if not begun:
                begun.append(self._now())
                if exchange is not None:
                    exchange.is_on = True
                # DDP waits for gradients in a callback of the same queue, which joins it later.
                torch.autograd.Variable._execution_engine.queue_callback(end)

        def end() -> None:
            if exchange is not None:
                exchange.is_on = False
            self._add(begun.pop())

        for tensor in output.values() if isinstance(output, Mapping) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(begin)

    def _begin(self, module: torch.nn.Module, *_) -> None:
        if self._is_inside:
            self._begun.append(self._now())

    def _end(self, module: torch.nn.Module, *_) -> None:
        if not self._is_inside or not self._begun:
            return
        self._add(self._begun.pop())

    def _add(self, start: Any) -> None:
        end = self._now()
        if self._uses_events:
            self._pending.append((start, end))
        else:
            self._seconds += end - start


def timed_parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model, or under FSDP2 what is gathered at once and holds nothing else that is."""
    if not isinstance(model, FSDPModule):
        return [model]
    parts = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    inner = [part for part in parts if not any(isinstance(m, FSDPModule) for m in part.modules() if m is not part)]
    return inner or [model]

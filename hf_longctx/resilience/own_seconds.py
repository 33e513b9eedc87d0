"""How long a rank computes, without its waits for others: the forward of a model, less the exchanges inside it.

A backward ends with gradients of all ranks, and a step with its slowest rank, so both take every rank equally long.
In a forward only the exchanges of shared rows wait, which a [`Stopwatch`] takes out; under FSDP2, which gathers
weights between layers, only the time inside the layers counts.
Price: two clock reads a module, or two events on a GPU's stream, and the stopwatch where rows are shared.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ..adapters.wrapped import unwrap
from ..parallel.stopwatch import Stopwatch


class OwnSeconds:
    """Times the forwards of a model in training.

    Args:
        model (`torch.nn.Module`): wrapped or not; hooks are put on it.
        device (`torch.device`): on CUDA, events are read once they have passed, and nothing waits.
        clock (`Callable`, *optional*): seconds, in place of all that.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self._uses_events = clock is None and device.type == "cuda"
        self._clock = clock or time.perf_counter
        self._seconds, self._is_inside = 0.0, False
        self._exchange: Stopwatch | None = None
        self._begun: list[Any] = []
        self._pending: list[tuple[Any, Any]] = []
        self._stopwatches: list[Stopwatch] = []
        whole = unwrap(model) if not isinstance(model, FSDPModule) else model
        self._hooks = [whole.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for part in timed_parts(whole):
            self._hooks += [part.register_forward_pre_hook(self._begin), part.register_forward_hook(self._end)]
        self._hooks.append(whole.register_forward_hook(self._leave, always_call=True))  # after the model's own end

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def take(self) -> float:
        """Seconds since the last call. On CUDA the CPU waits for the last forward."""
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

    def _leave(self, module: torch.nn.Module, *_) -> None:
        self._is_inside, self._begun = False, []
        if self._exchange is not None:
            self._exchange.is_on = False  # what backward exchanges is not ours
        self._exchange = None

    def _begin(self, module: torch.nn.Module, *_) -> None:
        if self._is_inside:
            self._begun.append(self._now())

    def _end(self, module: torch.nn.Module, *_) -> None:
        if not self._is_inside or not self._begun:
            return
        start, end = self._begun.pop(), self._now()
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

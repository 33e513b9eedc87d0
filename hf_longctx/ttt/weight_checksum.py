"""A checksum of a model's weights, from a few values of each: a cache of other weights is known by it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


_VALUES = 32  # of every parameter


class WeightChecksum:
    """The checksum of parameters, made again where one was replaced or changed in place.

    Price: counters of all parameters are compared at each call; where one has moved, a few values of each are copied.
    """

    def __init__(self) -> None:
        self._versions: tuple | None = None
        self._checksum: str | None = None

    def of(self, parameters: Iterable[torch.Tensor], fresh: bool = False) -> str | None:
        """The checksum, or `None` where weights are not whole on this process.

        Args:
            parameters: of the model, in order.
            fresh (`bool`): do not trust the counters, which a change through `.data` does not move.
        """
        held = list(parameters)
        if any(parameter.is_meta or isinstance(parameter, DTensor) for parameter in held):
            return None
        versions = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in held)
        if fresh or versions != self._versions:
            self._versions, self._checksum = versions, _checksum(held)
        return self._checksum


def active_adapters(modules: Iterable[torch.nn.Module]) -> str:
    """Adapters (PEFT) that take part in what modules compute, by name."""
    layers = [module for module in modules if hasattr(type(module), "disable_adapters")]
    names = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    return ", ".join(sorted(names)) or "none"


@torch.no_grad()
def _checksum(parameters: list[torch.Tensor]) -> str:
    sampled: list[tuple[int, torch.Tensor]] = []
    for index, parameter in enumerate(parameters):
        flat = parameter.detach().flatten()
        sampled.append((index, flat[:: max(1, len(flat) // _VALUES)][:_VALUES].double()))
    found: dict[int, torch.Tensor] = {}
    for device in {values.device for _, values in sampled}:  # one copy from each
        there = [(index, values) for index, values in sampled if values.device == device]
        pieces = torch.cat([values for _, values in there]).cpu().split([len(values) for _, values in there])
        found |= {index: piece for (index, _), piece in zip(there, pieces, strict=True)}
    return hashlib.sha256(torch.cat([found[index] for index in sorted(found)]).numpy().tobytes()).hexdigest()[:12]

"""Which bytes are alive, what for, and how many at most in each phase of a step.

A dispatch mode sees every operation after autograd, so it sees every tensor that forward, recomputation and backward
make, on real and on fake tensors alike. Storages are watched by weak reference: one that is freed is gone from the
breakdown at that moment. What a kernel allocates for itself while it runs is not seen.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode


# What bytes are for, in the order of a breakdown. Everything but the last is on the device.
KINDS = ("weights", "gradients", "optimizer", "hidden", "attention", "recurrent", "mlp", "logits", "workspace", "cpu")
CPU = KINDS[-1]


@dataclass
class _Entry:
    """A storage: held weakly, so that watching it does not keep it."""

    reference: weakref.ref
    kind: str
    nbytes: float


class StorageTracker(TorchDispatchMode):
    """Watch the storages that operations make while the mode is on.

    `kind` says what the tensors made next are for, and `phase` which part of the step runs; both may be set at any
    time. `peaks` holds for each pair of them the bytes of every kind at its fullest moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "workspace"
        self.share = 1.0  # of the bytes of what is made next
        self.live: dict[str, float] = dict.fromkeys(KINDS, 0)
        self.peaks: dict[tuple[str, str], dict[str, float]] = {}
        self.cpu_peak, self.cpu_count = 0.0, 0
        self._phase = ""
        self._device, self._on_cpu = 0.0, 0
        self._most: defaultdict[tuple[str, str], float] = defaultdict(lambda: -1.0)
        self._entries: dict[int, _Entry] = {}
        # Weak on both sides, or a tensor that lives on would keep the tracker.
        self._mine = weakref.ref(self)

    @property
    def phase(self) -> str:
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._phase = name
        self._note()

    @contextmanager
    def made(self, kind: str, share: float = 1.0) -> Iterator[None]:
        """Within the block, what is made is of `kind`, and counts with this share of its bytes."""
        before = self.kind, self.share
        self.kind, self.share = kind, share
        try:
            yield
        finally:
            self.kind, self.share = before

    def mark(self, tensors: torch.Tensor | Iterable[torch.Tensor], kind: str, share: float = 1.0) -> None:
        """Count the storages of `tensors` as `kind` from now on, whatever they were before."""
        for tensor in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
            self._add(tensor.untyped_storage(), kind, share)

    def forget_peaks(self) -> None:
        """Start the phases anew; what is alive stays counted."""
        self.peaks.clear()
        self.cpu_peak, self.cpu_count = self.live[CPU], self._on_cpu
        self._most.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.add.Tensor and not kwargs and _is_sum_of_gradients(*args):
            return args[0].add_(args[1])
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._see(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, torch.Tensor):
                    self._see(item)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._entries:
            self._add(storage, self.kind, self.share)

    def _add(self, storage: torch.UntypedStorage, kind: str, share: float) -> None:
        address = storage._cdata
        self._drop(address)
        nbytes = storage.nbytes() * share
        mine = self._mine

        def freed(reference: weakref.ref) -> None:
            tracker = mine()
            if tracker is not None and (entry := tracker._entries.get(address)) and entry.reference is reference:
                tracker._drop(address)

        self._entries[address] = _Entry(weakref.ref(storage, freed), kind, nbytes)
        self._count(kind, nbytes)
        self._note()

    def _drop(self, address: int) -> None:
        entry = self._entries.pop(address, None)
        if entry is not None:
            self._count(entry.kind, -entry.nbytes)

    def _count(self, kind: str, nbytes: float) -> None:
        self.live[kind] += nbytes
        if kind == CPU:
            self._on_cpu += 1 if nbytes > 0 else -1
            self.cpu_peak = max(self.cpu_peak, self.live[CPU])
            self.cpu_count = max(self.cpu_count, self._on_cpu)
        else:
            self._device += nbytes

    def _note(self) -> None:
        """Keep this moment if it is the fullest of its phase."""
        now = self._phase, self.kind
        if self._device > self._most[now]:
            self._most[now] = self._device
            self.peaks[now] = dict(self.live)


def is_backward() -> bool:
    """Whether autograd runs a backward; forwards that it repeats are part of it."""
    return torch._C._current_graph_task_id() != -1


def _is_sum_of_gradients(first: object, second: object) -> bool:
    """Whether autograd adds two gradients of one tensor: it does so in place, but not while a mode is on."""
    if not is_backward() or torch.is_grad_enabled():
        return False
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)) or first.shape != second.shape:
        return False
    fills_storage = first.untyped_storage().nbytes() == first.numel() * first.element_size()
    return fills_storage and first.dtype == second.dtype

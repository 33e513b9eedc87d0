"""Tell a tracker, while a model runs, which layer it is in and what for: forward, recomputation or backward.

Layers and their children are distinguished by name and shape: a recurrent layer is one for which there is an adapter,
what has "attn" or "attention" in its name is attention, any other child with matrices is the MLP, and the rest (norms,
residual stream) is `hidden`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from ..adapters.recurrent.layers import is_followed
from .fake_model import Stack
from .tracker import StorageTracker, is_backward


def watch_layers(
    model: torch.nn.Module, stack: Stack | None, tracker: StorageTracker, forward: str = "forward"
) -> None:
    """Set `tracker.phase` and `tracker.kind` from now on, whenever `model` runs.

    Phases: `"start"` until the first layer, `"forward i"`, `"loss"` from the last layer on and in its backward,
    `"backward i"`, `"end"` after the first layer. The layers of the last repetition are counted from the end, as -1,
    -2 and so on, so that short and tall stacks have them in common. `forward` names the forward in the place of
    `"forward"`.
    """
    tracker.kind = "hidden"
    if stack is None:
        return
    layers = model.get_submodule(stack.name)
    for index, layer in enumerate(layers):
        from_end = index - len(layers)
        name = str(from_end if -from_end <= stack.period and len(layers) > stack.period else index)
        layer.register_forward_pre_hook(_Enter(tracker, f"{forward} {name}", index == 0))
        layer.register_forward_hook(_Leave(tracker, name, index == len(layers) - 1))
        for child_name, child in layer.named_children():
            kind = _kind_of(child_name, child)
            child.forward = _within(child.forward, kind, tracker)


def _kind_of(name: str, module: torch.nn.Module) -> str:
    names = f"{name} {type(module).__name__}".lower()
    if is_followed(module):
        return "recurrent"
    if "attn" in names or "attention" in names:
        return "attention"
    return "mlp" if any(p.dim() > 1 for p in module.parameters()) else "hidden"


class _Enter:
    """Before a layer's forward; older transformers call hooks when they recompute it as well, which is backward."""

    def __init__(self, tracker: StorageTracker, name: str, is_first: bool) -> None:
        self.tracker, self.name, self.is_first = tracker, name, is_first

    def __call__(self, module: torch.nn.Module, args: tuple) -> None:
        if is_backward():
            return
        self.tracker.kind, self.tracker.phase = "hidden", self.name
        if self.is_first:
            _when_differentiated(args, self.tracker, "hidden", "end")


class _Leave:
    """After a layer's forward, whose output is where its backward begins."""

    def __init__(self, tracker: StorageTracker, name: str, is_last: bool) -> None:
        self.tracker, self.name, self.is_last = tracker, name, is_last

    def __call__(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        if is_backward():
            return
        _when_differentiated(output, self.tracker, "hidden", f"backward {self.name}")
        if self.is_last:
            self.tracker.kind, self.tracker.phase = "logits", "loss"


def _within(forward, kind: str, tracker: StorageTracker):
    """A forward whose tensors, and those of its backward, are of `kind`."""

    @wraps(forward)
    def watched(*args, **kwargs):
        with tracker.made(kind):
            output = forward(*args, **kwargs)
        _when_differentiated(output, tracker, kind)
        return output

    return watched


def _when_differentiated(output: Any, tracker: StorageTracker, kind: str, phase: str | None = None) -> None:
    """Set kind and phase when the gradient of the first tensor in `output` is known."""
    tensors = [output] if isinstance(output, torch.Tensor) else output
    tensor = next((x for x in tensors if isinstance(x, torch.Tensor)), None)
    if tensor is None or not tensor.requires_grad:
        return

    def enter(gradient: torch.Tensor) -> None:
        tracker.kind = kind
        if phase is not None:
            tracker.phase = phase
            # One buffer that all layers add to, wherever it was made.
            tracker.mark(gradient, "hidden")

    tensor.register_hook(enter)

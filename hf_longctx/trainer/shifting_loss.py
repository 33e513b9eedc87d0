"""Let a loss that shifts labels inside itself work on a shard, unchanged.

`compute_loss_func` and label smoothing take logits and labels of the same positions and shift by one token. On a shard
that would drop the last token's target, which lives on the next rank. The batch already holds every token's target
(`shift_labels`), so one dummy position is added in front of the labels and one behind the logits: the shift inside
then lands on exactly those targets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..parallel.shard import IGNORE_INDEX


class ShiftingLoss:
    """A loss function that receives this rank's targets, and is proven on its first call.

    Args:
        function (`Callable`): `(outputs, labels, *, num_items_in_batch, ...) -> loss`.
        shifts (`bool`): `function` shifts labels by one inside; it then gets targets that were shifted already, as
            if they were not. Otherwise (a masked language model) logits and labels are passed on as they are.
        check (`bool`): on the first call, prove that `function` divides a sum by `num_items_in_batch`, and shifts.

    Raises:
        ValueError: on the first call, if it does not.

    Memory: with `shifts`, one copy of the logits.
    """

    def __init__(self, function: Callable, shifts: bool, check: bool) -> None:
        self.function, self.shifts, self.check = function, shifts, check

    def __call__(self, outputs, labels: torch.Tensor, **kwargs):
        if self.shifts:
            labels = torch.nn.functional.pad(labels, (1, 0), value=IGNORE_INDEX)
            extended = _extend(outputs, 0.0)
        else:
            extended = outputs
        if self.check and kwargs.get("num_items_in_batch") is not None:
            self.check = False
            self._prove(outputs, extended, labels, kwargs)
        return self.function(extended, labels, **kwargs)

    @torch.no_grad()
    def _prove(self, outputs, extended, labels: torch.Tensor, kwargs: dict) -> None:
        count = kwargs["num_items_in_batch"]
        one = self.function(extended, labels, **kwargs)
        half = self.function(extended, labels, **{**kwargs, "num_items_in_batch": 2 * count})
        if not torch.allclose(one, 2 * half, rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"`compute_loss_func` returned {float(one):.6g} for `num_items_in_batch` {float(count):.6g} and "
                f"{float(half):.6g} for twice that: it must return a sum over tokens divided by `num_items_in_batch`, "
                "or shards with few valid tokens would weigh too much."
            )
        if not self.shifts:
            return
        last = labels.clone()
        last[:, -1] = 0
        same = self.function(extended, last, **kwargs)
        other = self.function(_extend(outputs, 50.0), last, **kwargs)
        if not torch.allclose(same, other, rtol=1e-4, atol=1e-6):
            raise ValueError(
                "`compute_loss_func` does not shift labels: it must compare the logits at position `i` with the label "
                "at `i + 1`, as the loss of a causal language model does; shift inside the function."
            )


def _extend(outputs, ramp: float):
    """The outputs with one more position behind the logits: zeros, or a ramp that any loss reading it would notice."""
    logits = torch.nn.functional.pad(outputs["logits"], (0, 0, 0, 1))
    if ramp:
        logits[:, -1] += torch.linspace(0, ramp, logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return type(outputs)(**{**outputs, "logits": logits})

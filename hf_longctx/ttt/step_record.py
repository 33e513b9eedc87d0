"""What the inner steps of training forwards were, summed until somebody reads it; nothing waits for the device."""

from __future__ import annotations

import torch

from .chunked_rows import RowsOutput


class StepRecord:
    """Sums over rows and chunks since the last `take`.

    `gradient` is the norm of the inner gradient before it is clipped, `step` that of the step, `gain` how much lower
    the loss of a chunk is for the step before it, on the forwards that measured it.

    Attributes:
        learning_rate (`float`, *optional*): that of the last forward.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.learning_rate: float | None = None
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}

    def add(self, output: RowsOutput, learning_rate: float, max_grad_norm: float) -> None:
        """Count one forward."""
        self.learning_rate = learning_rate
        norms = output.squares.detach().sum(1).sqrt()
        self._count("gradient", norms)
        self._count("step", learning_rate * norms.clamp(max=max_grad_norm))
        for gain in output.gains:
            self._count("gain", gain)

    def _count(self, name: str, values: torch.Tensor) -> None:
        total, count = self._sums.get(name, (values.new_zeros(()), 0))
        if values.numel():
            self._sums[name] = total + values.sum(), count + values.numel()

    def take(self, device: torch.device) -> torch.Tensor:
        """Sums and counts of the three, `(3, 2)`, which can be added over ranks; then begin anew."""
        empty = (torch.zeros(()), 0)
        pairs = [self._sums.get(name, empty) for name in ("gradient", "step", "gain")]
        self._sums = {}
        rows = [
            torch.stack([total.double().to(device), torch.tensor(float(n)).double().to(device)]) for total, n in pairs
        ]
        return torch.stack(rows)

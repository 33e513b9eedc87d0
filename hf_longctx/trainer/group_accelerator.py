"""accelerate as a library sees it where groups stand for processes: batches for groups, numbers once a group."""

from __future__ import annotations

from typing import Any

from accelerate.utils.operations import recursively_apply

from .loaders import assign_to_groups


class GroupAccelerator:
    """An accelerator whose loaders give one batch to all ranks of a group, and whose gathers count it once.

    Args:
        accelerator (`Accelerator`): that everything else is taken from.
        trainer: with a mesh; the accelerator is its own.
    """

    def __init__(self, accelerator: Any, trainer: Any) -> None:
        self._accelerator, self._trainer = accelerator, trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def prepare(self, loader: Any) -> Any:
        return assign_to_groups(self._trainer, loader, self._trainer.mesh.data_parallel_size)

    def gather_for_metrics(self, numbers: Any) -> Any:
        """Of one rank a group, in the order of groups. What filled up the last batch stays at the end."""
        mesh = self._trainer.mesh

        def one_a_group(gathered):
            by_rank = gathered.unflatten(0, (mesh.data_parallel_size, mesh.sequence_parallel_size, -1))
            return by_rank[:, 0].flatten(0, 1)

        return recursively_apply(one_a_group, self._accelerator.gather(numbers))

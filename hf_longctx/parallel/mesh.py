"""The two axes of a run, decided once: `dp` (different rows) and `sp` (different tokens of the same rows).

Ranks are laid out with `sp` innermost, so the processes that exchange heads in every layer are neighbours, on one node
whenever `sequence_parallel_size` fits there. This is the only file that creates process groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from ..config.run import validate_sequence_parallel_size
from .collectives import gather_integers


@dataclass(frozen=True)
class SequenceMesh:
    """Sizes, ranks and groups of the `dp` and `sp` axes.

    Build it with [`SequenceMesh.build`]. A group is `None` when there is nothing to exchange along its axis.
    `dp_group` holds the ranks with my `sp` rank, one of every sequence group.
    """

    data_parallel_size: int
    sequence_parallel_size: int
    data_parallel_rank: int
    sequence_parallel_rank: int
    sp_group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    dp_group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    # Whether a model was adapted on this mesh, or its absence was logged; see `shard_batch`.
    noted: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * self.sequence_parallel_size

    @classmethod
    def build(cls, sequence_parallel_size: int = 1, timeout: timedelta | None = None) -> SequenceMesh:
        """Lay the running processes out as `dp x sp`.

        Args:
            sequence_parallel_size (`int`, *optional*, defaults to 1): processes that share one sequence, `P`.
            timeout (`timedelta`, *optional*):
                How long a rank waits for the others of its group. Unset: torch's default for a backend, half an hour
                on gloo, whatever the whole world was given.

        Returns:
            [`SequenceMesh`]: with `data_parallel_size = W / P`; rank `r` is `(r // P, r % P)`.

        Raises:
            ValueError: `P` does not divide the number of processes, or differs between them.
            RuntimeError: `P > 1` before `torch.distributed` was initialised.

        Communication: one all-gather of 8 bytes over the world, and creating the groups, so every process must call
        it. With `P = 1` it creates nothing and needs no process group; `dp_group` then is the whole world.
        """
        validate_sequence_parallel_size(sequence_parallel_size)
        running = dist.is_available() and dist.is_initialized()
        if not running:
            if sequence_parallel_size > 1:
                raise RuntimeError(
                    f"`sequence_parallel_size` ({sequence_parallel_size}) needs that many processes, but "
                    "`torch.distributed` is not initialised: start with `torchrun --nproc_per_node "
                    f"{sequence_parallel_size} ...` and call `torch.distributed.init_process_group()` first."
                )
            return cls(1, 1, 0, 0)
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if world_size > 1:
            _validate_same_size(gather_integers(sequence_parallel_size, dist.group.WORLD))
        validate_world_size(world_size, sequence_parallel_size)
        sp_group, dp_group = None, dist.group.WORLD if world_size > 1 else None
        if sequence_parallel_size > 1:
            rows = range(0, world_size, sequence_parallel_size)
            members = [list(range(first, first + sequence_parallel_size)) for first in rows]
            sp_group, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
            places = [list(place) for place in zip(*members)] if len(members) > 1 else None
            dp_group = dist.new_subgroups_by_enumeration(places, timeout=timeout)[0] if places else None
        return cls(
            data_parallel_size=world_size // sequence_parallel_size,
            sequence_parallel_size=sequence_parallel_size,
            data_parallel_rank=rank // sequence_parallel_size,
            sequence_parallel_rank=rank % sequence_parallel_size,
            sp_group=sp_group,
            dp_group=dp_group,
        )


def _validate_same_size(sizes: list[int]) -> None:
    if len(set(sizes)) > 1:
        raise ValueError(
            f"`sequence_parallel_size` differs between ranks ({sizes[0]} on rank 0, "
            + ", ".join(f"{size} on rank {sizes.index(size)}" for size in sorted(set(sizes)) if size != sizes[0])
            + "): all processes of a run need the same; start them from one configuration."
        )


def validate_world_size(world_size: int, sequence_parallel_size: int) -> None:
    """Raise `ValueError` unless `sequence_parallel_size` divides `world_size`."""
    if world_size % sequence_parallel_size:
        divisors = [str(size) for size in range(1, world_size + 1) if world_size % size == 0]
        nearest = sequence_parallel_size * max(1, round(world_size / sequence_parallel_size))
        raise ValueError(
            f"`sequence_parallel_size` ({sequence_parallel_size}) must divide the number of processes ({world_size}): "
            f"start {nearest} processes, or set it to {' or '.join(divisors)}."
        )

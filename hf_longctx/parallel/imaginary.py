"""Ranks that do not exist, for plans of memory: what would arrive has its shape, and nothing is sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class ImaginaryRanks:
    """In the place of a process group.

    Args:
        rank (`int`): which of them this process stands for.
        size (`int`): how many there are.
    """

    rank: int
    size: int


def place_in(group: dist.ProcessGroup | ImaginaryRanks) -> tuple[int, int]:
    """My rank in a group, and its size."""
    if isinstance(group, ImaginaryRanks):
        return group.rank, group.size
    return dist.get_rank(group), dist.get_world_size(group)

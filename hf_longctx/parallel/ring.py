"""Blocks of rows that go round a group, so that no rank ever holds those of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist


def pass_round(
    block: torch.Tensor, group: dist.ProcessGroup, changed: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """Show every rank's block to every rank, mine first, then that of the rank before me, and so on.

    Args:
        block (`torch.Tensor`): mine; all ranks pass one shape and dtype.
        group (`ProcessGroup`): the axis to go round.
        changed (`bool`, *optional*, defaults to `False`):
            Whether ranks write into the blocks that they are shown. The blocks then wait for each other, and in the
            end each returns to its rank, so `block` is what all ranks have made of it.

    Yields:
        the rank that a block came from, and the block.

    Communication: `P - 1` messages of one block from each rank to the next, `P` if they are `changed`.
    Gradient: none; put it into a block to let it travel along.
    Memory: two more blocks.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    current, spare = block, [torch.empty_like(block) for _ in range(2)]
    for step in range(size):
        received, last = spare[step % 2], step == size - 1
        if changed:
            yield (rank - step) % size, current
            _wait(_start(current, block if last else received, group))
        else:
            moving = [] if last else _start(current, received, group)
            yield (rank - step) % size, current
            _wait(moving)
        current = received


def _start(send: torch.Tensor, receive: torch.Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    operations = [
        dist.P2POp(dist.isend, send, group=group, group_peer=(rank + 1) % size),
        dist.P2POp(dist.irecv, receive, group=group, group_peer=(rank - 1) % size),
    ]
    return dist.batch_isend_irecv(operations)


def _wait(moving: Sequence[dist.Work]) -> None:
    for work in moving:
        work.wait()

"""Dropout whose numbers depend on what they are for: a row, a head, a query and a key.

Attention that is computed for some queries at a time, on whichever rank, and again in the backward, has to drop the
same weights wherever that happens. So no random stream is read: every weight is hashed with one seed of the call.
Price: some integer operations for each weight.
"""

from __future__ import annotations

import torch


# The steps of SplitMix64, https://prng.di.unimi.it/splitmix64.c, in signed integers of 64 bits, which wrap around.
_ADDED, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_BITS = 24


def draw_seed() -> int:
    """A number for one call, from torch's default stream: the same on all ranks of a group, and in a recomputation."""
    return int(torch.randint(2**62, (1,)))


def drop_weights(weights: torch.Tensor, dropout: float, seed: int, *coordinates: torch.Tensor) -> torch.Tensor:
    """Set some attention weights to zero and scale the others up.

    Args:
        weights (`torch.Tensor`): of any shape.
        dropout (`float`): probability of zero.
        seed (`int`): of the call.
        coordinates (`torch.Tensor`): whole numbers that together tell one weight from all others, each of a shape that
            broadcasts to that of `weights`; the small ones first.

    Gradient: of the weights that are kept.
    """
    if dropout >= 1:
        return weights * 0
    state = torch.full((), seed, dtype=torch.int64, device=weights.device)
    for coordinate in coordinates:
        state = _mixed(state ^ coordinate.long())
    kept = (_shifted(state, 64 - _BITS)) >= round(dropout * 2**_BITS)
    return torch.where(kept, weights / (1 - dropout), 0)


def _mixed(state: torch.Tensor) -> torch.Tensor:
    state = state + _ADDED
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(state: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros from the left."""
    return (state >> by) & (2 ** (64 - by) - 1)

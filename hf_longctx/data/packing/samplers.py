"""Batches that count tokens instead of rows, and an order of rows in which all ranks of a step have equal work.

`TokenBudgetSampler` is for a loop of one's own over a plain data set, with `PackingCollator`; `BalancedSampler` orders
the rows of a `PackedDataset`. Both depend on their arguments and the epoch only, so every rank draws its own part
without communication. Price: the packing of all lengths, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from .lengths import balanced_order, pack_lengths, validate_max_tokens


class TokenBudgetSampler(Sampler):
    """Batches of rows that have at most `max_tokens` tokens together: a `batch_sampler` of `DataLoader`.

    ```python
    sampler = TokenBudgetSampler(lengths, max_tokens=8192, num_replicas=4, rank=rank)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=PackingCollator())
    ```

    Every replica draws the same number of batches, of rows that the others do not draw. Where the batches do not
    divide evenly, the first ones of the epoch are drawn again, or with `drop_last` the last ones are left out. This
    sampler splits by replica already, so `accelerate` must not split the loader again: prepare the model and leave
    the loader out.

    Args:
        lengths (`Sequence[int]`): tokens of every row, as from [`measure_lengths`].
        max_tokens (`int`): the budget of a batch, in tokens.
        num_replicas (`int`, *optional*, defaults to 1): data-parallel ranks; under sequence parallelism the groups.
        rank (`int`, *optional*, defaults to 0): which of them is mine.
        strategy (`str`, *optional*, defaults to `"best_fit_decreasing"`): see [`pack_lengths`].
        shuffle (`bool`, *optional*, defaults to `True`):
            Draw the batches in a new random order each epoch, those of one step with nearly the same cost. Otherwise
            in the order they were packed.
        seed (`int`, *optional*, defaults to 0): the same on all replicas.
        linear_tokens (`float`, *optional*, defaults to `12 * 1024`): 12 times the hidden size; see [`packing_cost`].
        drop_last (`bool`, *optional*, defaults to `False`): leave out what does not fill a step.

    Raises:
        ValueError: no row, an empty one, one over the budget, a rank out of range, or nothing left by `drop_last`.

    Communication: none.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        strategy: str = "best_fit_decreasing",
        shuffle: bool = True,
        seed: int = 0,
        linear_tokens: float = 12 * 1024,
        drop_last: bool = False,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"`rank` ({rank}) must be at least 0 and below `num_replicas` ({num_replicas}).")
        validate_max_tokens(max_tokens)
        lengths = np.asarray(lengths)
        long = np.flatnonzero(lengths > max_tokens)
        if len(long):
            raise ValueError(
                f"row {long[0]} has {lengths[long[0]]} tokens, over `max_tokens` ({max_tokens}), one of {len(long)} "
                "such rows, and a sampler cannot cut rows: raise `max_tokens`, or use `PackedDataset` with "
                "`long_documents`."
            )
        self.packing = pack_lengths(lengths, max_tokens, strategy=strategy, seed=seed)
        if drop_last and len(self.packing) < num_replicas:
            raise ValueError(
                f"`drop_last` leaves no batch: {len(self.packing)} batches do not fill a step of {num_replicas} "
                "replicas; set it to `False`, or lower `max_tokens`."
            )
        self.num_replicas, self.rank, self.shuffle, self.drop_last = num_replicas, rank, shuffle, drop_last
        self.seed, self.epoch = seed, 0
        self._costs = self.packing.costs(linear_tokens)

    def set_epoch(self, epoch: int) -> None:
        """Draw another order; call it before each epoch, on all replicas."""
        self.epoch = epoch

    def __len__(self) -> int:
        steps = len(self.packing) / self.num_replicas
        return math.floor(steps) if self.drop_last else math.ceil(steps)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(len(self.packing))
        if self.shuffle:
            order = balanced_order(self._costs, self.num_replicas, seed=self.seed, epoch=self.epoch)
        order = np.resize(order, len(self) * self.num_replicas)  # cut, or begun again
        for index in order[self.rank :: self.num_replicas].tolist():
            yield [piece.row for piece in self.packing[index]]


class BalancedSampler(Sampler):
    """Numbers of rows in an order in which every `group_size` consecutive ones cost nearly the same.

    For a data set whose consecutive rows are assigned to consecutive ranks, as the trainers do:
    `BalancedSampler(packed.packing.costs(12 * hidden_size), group_size=ranks)`.

    Args:
        costs (`Sequence[float]`): cost of every row.
        group_size (`int`): rows of one step over all data-parallel ranks.
        seed (`int`, *optional*, defaults to 0): the same on all ranks.
        window (`int`, *optional*, defaults to 32): see [`balanced_order`].
    """

    def __init__(
        self, costs: Sequence[float] | np.ndarray, group_size: int, *, seed: int = 0, window: int = 32
    ) -> None:
        self.costs = np.asarray(costs, dtype=np.float64)
        self.group_size, self.seed, self.window, self.epoch = group_size, seed, window, 0
        balanced_order(self.costs[:0], group_size, seed=seed, window=window)  # refuses what is out of range

    def set_epoch(self, epoch: int) -> None:
        """Draw another order; call it before each epoch, on all ranks."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self) -> Iterator[int]:
        order = balanced_order(self.costs, self.group_size, seed=self.seed, epoch=self.epoch, window=self.window)
        return iter(order.tolist())

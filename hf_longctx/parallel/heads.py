"""Which heads each rank owns. Pure arithmetic, no tensors, no processes.

Query heads are split into contiguous ranges whose sizes differ by at most one, so 9 heads on 2 ranks are 5 and 4. A
rank needs the key/value heads that its query heads read, and no others; where two ranks read the same head, both
receive it and their gradients for it are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class HeadSplit:
    """Head ranges of every rank, half open: `query[r] = (start, stop)`, `key_value[r] = (start, stop)`."""

    num_query_heads: int
    num_key_value_heads: int
    query: tuple[tuple[int, int], ...]
    key_value: tuple[tuple[int, int], ...]

    def query_count(self, rank: int) -> int:
        return self.query[rank][1] - self.query[rank][0]

    def key_value_count(self, rank: int) -> int:
        return self.key_value[rank][1] - self.key_value[rank][0]

    def key_value_index(self, rank: int) -> tuple[int, ...] | None:
        """The local key/value head that each local query head reads, or `None` if plain grouping already says so."""
        return group_index(*self.query[rank], self.num_query_heads // self.num_key_value_heads)

    def replication(self) -> float:
        """Key/value heads received by all ranks together, divided by the heads that exist. 1.0 is no replication."""
        return sum(self.key_value_count(rank) for rank in range(len(self.query))) / self.num_key_value_heads


def group_index(start: int, stop: int, group_size: int) -> tuple[int, ...] | None:
    """The key/value head that each of the query heads `start` to `stop` reads, counted from the first that is read.

    Args:
        group_size (`int`): query heads that read one key/value head.

    Returns:
        `tuple` of `int`, or `None` if plain grouping already says so.
    """
    first = start // group_size
    index = tuple(head // group_size - first for head in range(start, stop))
    local_group, rest = divmod(len(index), index[-1] + 1)
    if not rest and index == tuple(i // local_group for i in range(len(index))):
        return None
    return index


@lru_cache(maxsize=256)
def split_heads(num_query_heads: int, num_key_value_heads: int, size: int) -> HeadSplit:
    """Split the heads of one attention layer over `size` ranks.

    Raises:
        ValueError: more ranks than query heads, or query heads that are not a multiple of the key/value heads.
    """
    validate_head_count(num_query_heads, size)
    if num_query_heads % num_key_value_heads:
        raise ValueError(
            f"the number of query heads ({num_query_heads}) must be a multiple of the key/value heads "
            f"({num_key_value_heads}): this layer cannot be split by heads; set `sequence_parallel_size` to 1."
        )
    group_size = num_query_heads // num_key_value_heads
    smaller, larger_ranks = divmod(num_query_heads, size)
    query, key_value, start = [], [], 0
    for rank in range(size):
        stop = start + smaller + (rank < larger_ranks)
        query.append((start, stop))
        key_value.append((start // group_size, (stop - 1) // group_size + 1))
        start = stop
    return HeadSplit(num_query_heads, num_key_value_heads, tuple(query), tuple(key_value))


def validate_head_count(num_query_heads: int, size: int) -> None:
    """Raise `ValueError` if some rank would own no query head."""
    if size > num_query_heads:
        raise ValueError(
            f"`sequence_parallel_size` ({size}) exceeds the model's query heads ({num_query_heads}): every rank needs "
            f"at least one head; any size from 1 to {num_query_heads} that divides the number of processes works."
        )

"""A cache-shaped object by which an indexer's own code makes its keys, or meets keys that are known.

An indexer hands its keys to a cache and goes on with all that the cache returns. So a cache that stops it there tells
the keys of my tokens, and one that has the keys of a whole row, or of a document, lets its code pick among those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Made(Exception):
    """The keys of an indexer, on their way out of its forward."""


class KnownKeys:
    """A cache whose layers have known keys, or that stops an indexer once it has made its own.

    Args:
        keys (`torch.Tensor`, *optional*): what the indexer goes on with, as it made its own: `(B, T, ...)`, or
            `(B, heads, T, H)`.
    """

    def __init__(self, keys: torch.Tensor | None = None) -> None:
        self.keys = keys

    @property
    def layers(self) -> KnownKeys:
        return self

    def __getitem__(self, _: int) -> KnownKeys:
        return self

    def get_seq_length(self) -> int:
        """Tokens of keys `(B, T, ...)`."""
        return 0 if self.keys is None else self.keys.shape[1]

    def update_indexer(self, keys: torch.Tensor, *_: object) -> torch.Tensor:
        """The known keys."""
        if self.keys is None:
            raise _Made(keys)
        return self.keys

    update_index = update_indexer  # as layers with blocks call it


def made_keys(own: Callable, given: dict[str, Any], cache: str) -> torch.Tensor:
    """The keys that an indexer makes of my tokens.

    Args:
        own (`Callable`): its forward.
        given (`dict`): the arguments of it by name.
        cache (`str`): what it calls its cache.
    """
    try:
        own(**{**given, cache: KnownKeys()})
    except _Made as made:
        return made.args[0]
    raise AssertionError("an indexer hands its keys to a cache")

"""What a `TTTCache` knows of the model that read into it and of its own state, and refuses by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .prime import Fast


# What a cache is made for. Its other facts are those of the model that first reads into it.
_SIZES = ("window", "chunk_tokens", "layers", "suffix_layers")
# First tokens that are kept, to know a prompt that holds them again.
_FIRST_TOKENS = 16


class CheckedCache:
    """What every use of a cache checks first.

    Args:
        facts: what it must agree on with a model ([`TTTForCausalLM.cache_facts`]).
    """

    fast: Fast  # these of the cache
    seen: int
    _map: Any

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        self.frozen_by = "learn=False"
        self.unread: torch.Tensor | None = None
        self.first_ids: torch.Tensor | None = None
        self.damage: str | None = None
        # While `generate()` runs: what it has found of the model's weights, which need no second look for each token.
        self.checked: dict[str, Any] | None = None

    @property
    def known(self) -> int:
        """Tokens that were read, or will be before anything else."""
        return self.seen + (0 if self.unread is None else self.unread.shape[1])

    def validate_facts(self, facts: dict[str, Any]) -> None:
        """Raise `ValueError` unless it belongs to a model with these facts, `RuntimeError` if it is damaged."""
        self.validate_whole()
        for name, value in facts.items():
            known = self.facts.get(name) if self.fast or name in _SIZES else None
            if known is None or value is None or known == value:
                continue
            if name == "weights":
                raise ValueError(
                    f"the cache was read by other weights (their checksum is {known}) than the model has now "
                    f"({value}): use it with the very model that read it, not trained since, or read again."
                )
            if name == "dtype":
                raise ValueError(
                    f"the cache was read by a model in {known}, but this one is in {value}: read and ask in one "
                    "precision, or read again."
                )
            raise ValueError(
                f"the cache was made with `{name}` {known}, but the model has {value}: use it with the model that "
                "read into it, or read again."
            )

    def validate_whole(self) -> None:
        """Raise `RuntimeError` if what it holds is not what was read."""
        if self.damage is not None:
            raise RuntimeError(
                f"the cache cannot be used any more, since {self.damage}: go on from a copy that was made before "
                "(`memory.copy()`), or read again."
            )

    @contextlib.contextmanager
    def changing(self, what: str, in_place: bool = False) -> Iterator[None]:
        """A cache whose reading ended in an exception is damaged: what it holds is half of what was to be read.

        Args:
            what (`str`): what reads.
            in_place (`bool`): whether it changes from the first moment on, and not with whole pieces.
        """
        before = self.seen
        try:
            yield
        except GeneratorExit:  # whole pieces were read, and no more is wanted
            raise
        except BaseException as error:
            if self.damage is None and (in_place or self.seen != before):
                self.damage = f"{what} ended in `{type(error).__name__}` and left it half changed"
            raise

    def begin_reading(self, input_ids: torch.Tensor, facts: dict[str, Any]) -> None:
        """Take over the facts of a first reader, note the first tokens, and leave inference mode."""
        if not self.fast:
            self.facts |= {name: value for name, value in facts.items() if name not in _SIZES}
        known = 0 if self.first_ids is None else self.first_ids.shape[1]
        if known < _FIRST_TOKENS and known == self.seen:
            first = input_ids if self.first_ids is None else torch.cat((self.first_ids, input_ids), 1)
            self.first_ids = first[:, :_FIRST_TOKENS].clone()
        if not torch.is_inference_mode_enabled():
            # tensors of inference mode cannot be changed in place outside it
            self._map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

"""One call of an attention layer that has a code of its own, and the way from there to our attention function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.masking_utils import sliding_window_overlay

from ...attention.cache_names import find_cache
from ...attention.call_documents import refuse_cache
from ...attention.deferred import DeferredMask
from ...attention.implicit_positions import packs_documents
from ...attention.registry import AttentionEntry
from ...parallel.shard import SequenceShard
from ..pass_shard import ForwardRows


# How layers call the hidden states of another sequence, to which they attend.
_OTHER_SEQUENCE = ("encoder_hidden_states", "key_value_states", "kv")


@dataclass(frozen=True, eq=False)
class OwnCall:
    """A call of an attention layer on rows that ranks share, or that pack documents.

    Args:
        module (`torch.nn.Module`): the layer.
        given (`dict`): its arguments by name.
        rows ([`ForwardRows`]): of the forward that runs.
        shard ([`SequenceShard`]): of those rows.
        entry ([`AttentionEntry`]): the attention that the model runs.
    """

    module: torch.nn.Module
    given: dict[str, Any]
    rows: ForwardRows
    shard: SequenceShard
    entry: AttentionEntry

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        window: int | None = None,
        is_causal: bool | None = None,
        returns_cache: bool = True,
        **extras: object,
    ) -> torch.Tensor:
        """Run the attention function of the model on my tokens of whole rows.

        Args:
            query (`torch.Tensor` of shape `(B, N, t, H)`), key (`(B, K, t, H)`), value (`(B, K, t, H_v)`): with
                positions applied.
            dropout (`float`): of attention, while the layer trains.
            scaling (`float`, *optional*): of the scores; `None` is `H ** -0.5`.
            window (`int`, *optional*): a causal layer sees the last `window` tokens, itself included.
            is_causal (`bool`, *optional*): for a layer whose model makes its own mask, which then is not read: it can
                hold nothing but padding and this rule, since a shard or bounds refuse any other mask of the caller.
            returns_cache (`bool`): a cache among the arguments leaves the model.
            extras: further arguments of the attention function.

        Returns:
            `torch.Tensor` of shape `(B, t, N * H_v)`.

        Raises:
            NotImplementedError: cross-attention, or what the attention function does not compute.
            ValueError: a cache that the caller passed, or that packed rows would fill.
        """
        self._validate(returns_cache)
        mask = self.given.get("attention_mask") if is_causal is None else None
        if window is not None and isinstance(mask, DeferredMask):
            mask = mask.restricted(sliding_window_overlay(window))
        output, _ = self.entry.function(
            self.module,
            query,
            key,
            value,
            mask,
            dropout=dropout if self.module.training else 0.0,
            scaling=scaling,
            is_causal=is_causal,
            sequence_shard=self.shard,
            **extras,
        )
        return output.flatten(2)

    def ignoring_padding(self) -> OwnCall:
        """The same call in which tokens see padding, as those of a model do that only sets padding to 0."""
        if packs_documents(self.shard):
            return self
        return replace(self, shard=replace(self.shard, segment_ids=None, only_right_padding=True))

    def function(self, name: str) -> Callable:
        """A function of the module of transformers in which the layer is written."""
        forward = type(self.module).forward
        while getattr(forward, "__wrapped__", None) is not None:
            forward = forward.__wrapped__
        return forward.__globals__[name]

    def _validate(self, returns_cache: bool) -> None:
        """Refuse keys that are not those of the rows' own tokens, and a cache, which packed rows cannot fill."""
        if any(self.given.get(name) is not None for name in _OTHER_SEQUENCE):
            raise NotImplementedError(
                f"`{type(self.module).__name__}` attends to `encoder_hidden_states`, a sequence of another length, "
                "which is not sharded or packed: leave it out, or set `sequence_parallel_size` to 1."
            )
        fills_cache = returns_cache and find_cache(self.given) is not None and packs_documents(self.shard)
        if self.rows.has_cache or fills_cache:
            refuse_cache()

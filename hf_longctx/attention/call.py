"""One call of an attention layer, as one value that can be cut by heads.

What reaches attention is more than query, key and value: a mask, dropout, a scale, and inputs with one entry a head
(sinks, slopes, rotations). Code that works on some of the heads needs all of it cut alike, so it travels together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..parallel.heads import group_index
from ..parallel.shard import SequenceShard
from .deferred import DeferredMask
from .masks import AttentionRule, KernelPlan, build_mask, plan_row


if TYPE_CHECKING:
    from .registry import AttentionEntry


class KeySelection:
    """Stands for the mask of a sparse layer, whose keys are not those of its queries' tokens."""

    def attend(self, call: AttentionCall, shard: SequenceShard) -> torch.Tensor:
        """Attention of my tokens to the keys that the layer selected.

        Args:
            call ([`AttentionCall`]): `t` queries of all heads, and keys of whole rows.
            shard ([`SequenceShard`]): of the rows.

        Returns:
            `torch.Tensor` of shape `(B, t, N, H_v)`.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What an attention layer passes to its attention function; made by [`AttentionEntry.call`].

    Args:
        entry ([`AttentionEntry`]): the name that the layer runs.
        module (`torch.nn.Module`): the attention layer; read, never changed.
        query (`torch.Tensor` of shape `(B, n, T, H)`): some heads, or all.
        key (`torch.Tensor` of shape `(B, k, T, H)`): `k` divides `n`.
        value (`torch.Tensor` of shape `(B, k, T, H_v)`): of those heads.
        mask (`object`, *optional*): transformers' description of the mask ([`DeferredMask`]); anything else is a mask
            that the model made itself.
        dropout (`float`): attention dropout.
        scaling (`float`, *optional*): score scale; `None` is `H ** -0.5`.
        is_causal (`bool`, *optional*): overrides `module.is_causal` where there is no mask.
        per_head (`Mapping`): by name, inputs whose first dimension is the query heads; the registry entry lists
            these names. An input that the layer passes as `None` stays `None`.
        extras (`Mapping`): every other keyword argument of the call.
        first_head (`int`): which of all query heads of the layer is the first one here.
    """

    entry: AttentionEntry
    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: object = None
    dropout: float = 0.0
    scaling: float | None = None
    is_causal: bool | None = None
    per_head: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    extras: Mapping[str, object] = field(default_factory=dict)
    first_head: int = 0

    def of_heads(self, heads: slice) -> AttentionCall:
        """The same call for some of its query heads, with the key/value heads that they read.

        Args:
            heads (`slice`): of this call's query heads, without a step.

        Memory: views, unless the heads do not group evenly over their key/value heads, which are then repeated.
        """
        start, stop, _ = heads.indices(self.query.shape[1])
        group_size = self.query.shape[1] // self.key.shape[1]
        shared = slice(start // group_size, (stop - 1) // group_size + 1)
        return self.holding(heads, self.query[:, start:stop], self.key[:, shared], self.value[:, shared])

    def holding(self, heads: slice, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionCall:
        """The same call on tensors that hold these heads only, as after an all-to-all; per-head inputs are cut here.

        Args:
            heads (`slice`): which of this call's query heads `query` holds.
            query (`torch.Tensor` of shape `(B, m, T, H)`): of those heads.
            key (`torch.Tensor` of shape `(B, l, T, H)`): the key/value heads that those read, each once.
            value (`torch.Tensor` of shape `(B, l, T, H_v)`): likewise.
        """
        start, stop, _ = heads.indices(self.query.shape[1])
        index = group_index(start, stop, self.query.shape[1] // self.key.shape[1])
        if index is not None:
            chosen = torch.tensor(index, device=key.device)
            key, value = key.index_select(1, chosen), value.index_select(1, chosen)
        per_head = {name: None if x is None else x[start:stop] for name, x in self.per_head.items()}
        tensors = {"query": query, "key": key, "value": value}
        return replace(self, **tensors, per_head=per_head, first_head=self.first_head + start)

    def rule(self) -> AttentionRule:
        """Which keys a query may see inside its own document.

        Raises:
            NotImplementedError: the mask holds a function that cannot be read.
        """
        if isinstance(self.mask, DeferredMask):
            return self.mask.rule()
        is_causal = getattr(self.module, "is_causal", True) if self.is_causal is None else self.is_causal
        return AttentionRule(causal=is_causal)

    def plan(self, shard: SequenceShard) -> KernelPlan:
        """The rule applied to the whole rows of `shard`: causality, a window, and segments on their own."""
        return plan_row(self.rule(), shard, self.query.shape[0], self.query.device)

    def additive_mask(self, shard: SequenceShard) -> torch.Tensor:
        """The plan as numbers that are added to scores: 0, or the lowest number of the precision.

        Returns:
            `torch.Tensor` of shape `(B, 1, T, T)`, or `(1, 1, T, T)` if rows are alike.

        Memory: that. For kernels that need no mask, read [`AttentionCall.plan`] instead.
        """
        rows, _, num_tokens, _ = self.query.shape
        return build_mask(self.plan(shard), "eager", rows, num_tokens, self.query.dtype, self.query.device)

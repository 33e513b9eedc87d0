"""Heads that pool a row (classification, rewards) on shares of rows: the head sees whole rows, its backbone a share.

What: a forward gets whole rows on every rank of a group. Its backbone runs on a share. A head that scores every token
(`score`, as decoders have it) scores the share, and its scores are gathered, a number a token and label; the class's
own forward then picks the last real token of each whole row. Any other head gets gathered hidden states, and pools
them as it does in one process. Loss and metrics are the library's, computed on every rank.

How: patches of `forward` on the model, its backbone, its `score` or its pooler, which act within [`rows_shared`].
Price: one all-gather, and one reduce-scatter in the backward, of `(B, T, labels)` numbers with a `score`, of
`(B, T, D)` without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..adapters.instance_forward import InstancePatch, PatchHandle, named_arguments, patch_on, put_on
from ..adapters.wrapped import backbone_of, unwrap
from ..parallel.segments import has_documents
from .whole_rows import WholeRows, WholeRowsPatch


POOLED_ROWS = "pooled rows"


def pools_rows(model: torch.nn.Module) -> bool:
    """Whether the head of a transformers model gives one vector a row: it is a classifier of rows."""
    return type(unwrap(model)).__name__.endswith("ForSequenceClassification")


def pool_whole_rows(model: torch.nn.Module, counts_real_tokens: bool = False) -> PatchHandle:
    """Patch a model whose head pools a row: within [`rows_shared`] its backbone runs on shares of whole rows.

    Args:
        model (`torch.nn.Module`): wrapped or not, after its adapters are attached.
        counts_real_tokens (`bool`, *optional*, defaults to `False`): it numbers the tokens that its mask keeps.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.

    Gradient: that of one process, after a wrapper's mean over the ranks, for any loss of the outputs that every rank
        of a group computes alike.
    """
    put_on(unwrap(model), PooledRowsPatch(counts_real_tokens))
    return PatchHandle(model, POOLED_ROWS)


class PooledRowsPatch(WholeRowsPatch, InstancePatch):
    """On the model: passes its whole rows to the patches below for the time of a call."""

    name = POOLED_ROWS

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given = named_arguments(module, args, kwargs)
        if self.sharing is None or given.get("sequence_shard") is not None:
            return own(*args, **kwargs)
        backbone = backbone_of(module)
        head = getattr(module, "score", None)
        pooler = getattr(backbone, "pooler", None)
        gathering = [layer for layer in (head or pooler,) if layer is not None]
        # What an adapter or a wrapper has replaced since gets a patch of its own.
        parts: list[Any] = [_part(backbone, _BackbonePatch), *[_part(layer, _HeadPatch) for layer in gathering]]
        parts[0].counts_real_tokens, parts[0].sharing = self.counts_real_tokens, self.sharing
        parts[0].gathers, parts[0].reads_left_padding = head is None, self.reads_left_padding
        for part in parts[1:]:
            part.scores = head is not None
        call = _Call()
        for part in parts:
            part.current = call
        try:
            return own(*args, **kwargs)
        finally:
            parts[0].sharing = None
            for part in parts:
                part.current = None


class _Call:
    """One forward of the model: its rows, once the backbone has been called."""

    rows: WholeRows | None = None


class _BackbonePatch(WholeRowsPatch, InstancePatch):
    """On the model without its head: my share of whole rows."""

    name = POOLED_ROWS
    current: _Call | None = None
    gathers = False

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        if self.current is None:
            return own(*args, **kwargs)
        given = named_arguments(module, args, kwargs)
        self.current.rows = rows = WholeRows(module, given, self)
        share = rows.share()
        if has_documents(rows.shard.segment_ids):
            raise NotImplementedError(
                f"the head on `{type(module).__name__}` pools a row, and would pool the documents of a packed one "
                "together: train it on padded rows."
            )
        outputs = own(**share)
        if self.gathers:
            outputs["last_hidden_state"] = rows.gather(outputs["last_hidden_state"])
        return outputs


class _HeadPatch(InstancePatch):
    """On `score`: the scores of whole rows. On a pooler: the hidden states of whole rows."""

    name = POOLED_ROWS
    current: _Call | None = None
    scores = True

    def call(self, module: torch.nn.Module, own: Callable, hidden: torch.Tensor, *args, **kwargs):
        rows = None if self.current is None else self.current.rows
        if rows is None or hidden.shape[1] != rows.shard.local_len:
            return own(hidden, *args, **kwargs)
        if self.scores:
            return rows.gather(own(hidden, *args, **kwargs))
        return own(rows.gather(hidden), *args, **kwargs)


def _part(module: torch.nn.Module, kind: type[Any]) -> Any:
    if patch_on(module, POOLED_ROWS) is None:
        put_on(module, kind())
    return patch_on(module, POOLED_ROWS)

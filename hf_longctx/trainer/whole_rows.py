"""Whole rows outside of a model, shares of them inside: what is cut on the way in, and gathered on the way out.

Losses that look at whole rows (a log-ratio of two answers, the last token's score) get them: every rank of a group
passes the same rows to its model, which runs on its share. What comes back is one number a token, gathered to whole
rows, so the loss is the library's own, and the same on every rank of the group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.instance_forward import patches_on
from ..families import first_position, position_axes
from ..parallel.gathered import gather_tokens
from ..parallel.mesh import SequenceMesh
from ..parallel.shard import IGNORE_INDEX, SequenceShard, cut_batch, validate_same_rows


@dataclass(frozen=True)
class RowSharing:
    """How the rows of a forward are shared, and laid out.

    Args:
        mesh ([`SequenceMesh`]): the axes of the run.
        inner_attention (`str`): see [`LongContextConfig`].
        flatten (`bool`): leave padding out: all rows become one row of documents.
    """

    mesh: SequenceMesh
    inner_attention: str = "auto"
    flatten: bool = False


class WholeRowsPatch:
    """What the patches of a model have in common: nothing is shared outside of [`rows_shared`].

    Attributes:
        sharing ([`RowSharing`], *optional*): for the time of a block. It holds process groups, which no copy of a
            model may hold.
        counts_real_tokens (`bool`): the model numbers the tokens that its mask keeps, not all of them.
        reads_left_padding (`bool`): in one process padding in front of a row changes what the row gives, in a way that
            rows which are shared or flattened have not.
    """

    sharing: RowSharing | None = None
    reads_left_padding = False

    def __init__(self, counts_real_tokens: bool = False) -> None:
        self.counts_real_tokens = counts_real_tokens


@contextmanager
def rows_shared(sharing: RowSharing, *models: torch.nn.Module) -> Iterator[None]:
    """A block in which the ranks of a group share the rows that they pass to these models.

    Outside of it a forward is the process's own: `generate` of one rank waits for no other.
    """
    patches = {id(patch): patch for model in models for module in model.modules() for patch in patches_on(module)}
    mine: list[Any] = [patch for patch in patches.values() if isinstance(patch, WholeRowsPatch)]
    before = [patch.sharing for patch in mine]
    for patch in mine:
        patch.sharing = sharing
    try:
        yield
    finally:
        for patch, value in zip(mine, before):
            patch.sharing = value


class WholeRows:
    """The rows of one forward.

    Args:
        module (`torch.nn.Module`): the model of transformers that gets them.
        given (`dict`): its arguments by name, of whole rows.
        patch ([`WholeRowsPatch`]): on it, within [`rows_shared`].
        targets (`torch.Tensor` of shape `(B, T)`, *optional*): what each token is to predict.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        given: dict[str, Any],
        patch: WholeRowsPatch,
        targets: torch.Tensor | None = None,
    ) -> None:
        assert patch.sharing is not None
        self.sharing, self.given, self.targets = patch.sharing, given, targets
        self.config: Any = module.config
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None:
            raise ValueError(
                f"`{type(module).__name__}` got neither `input_ids` nor `inputs_embeds` of whole rows: pass one."
            )
        self.shape = tuple(tokens.shape[:2])
        mask = given.get("attention_mask")
        self.real = torch.ones(self.shape, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
        if patch.reads_left_padding and not self.real[:, 0].all():
            raise ValueError(
                f"a row has padding on the left, and `{type(module).__name__}` reads it in one process (a state that "
                "runs through it, a head on the first token): pad on the right."
            )
        # A rotary embedding with planes counts in its own way, and so does a batch that brings positions.
        self.positions = given.get("position_ids")
        if self.positions is None:
            counted = torch.arange(self.shape[1], device=tokens.device).expand(self.shape)
            if patch.counts_real_tokens:
                counted = (self.real.cumsum(1) - 1).clamp(min=0) + first_position(self.config)
            self.positions = counted.contiguous()
        if targets is not None and (targets != IGNORE_INDEX).logical_and(~self.real).any():
            raise ValueError(
                "padding on the left has a target (the first real token of a row), and what a model predicts from "
                "padding depends on the kernel: begin rows with a token that is not trained, or pad on the right."
            )

    def share(self) -> dict[str, Any]:
        """The arguments of a forward on my tokens."""
        rows = self._flat() if self.sharing.flatten else self._padded()
        others = {key: value for key, value in self.given.items() if key not in rows}
        mesh = self.sharing.mesh
        share = cut_batch(
            rows,
            mesh.sequence_parallel_size,
            mesh.sequence_parallel_rank,
            inner_attention=self.sharing.inner_attention,
            shift_labels=False,
            position_axes=position_axes(self.config),
        )
        # The loss of whole rows is computed on every rank, so a term of its routers counts as it is.
        self.shard: SequenceShard = dataclasses.replace(share["sequence_shard"].bind(mesh), batch_weight=1.0)
        validate_same_rows(self.shard)
        if self.sharing.flatten:
            others.pop("attention_mask", None)
        return {**others, **share, "sequence_shard": self.shard}

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """`(B, T, ...)` of what was computed for my tokens, 0 for padding that was left out."""
        whole = gather_tokens(local, self.shard.group, self.shard.stopwatch)[:, : self.shard.num_tokens]
        if not self.sharing.flatten:
            return whole
        rows = whole.new_zeros(*self.shape, *whole.shape[2:])
        real = self.real.view(*self.shape, *[1] * (whole.dim() - 2)).expand_as(rows)
        return rows.masked_scatter(real, whole[0])

    def _padded(self) -> dict[str, Any]:
        rows = {key: value for key, value in self.given.items() if self._is_of_tokens(value)}
        return self._with_targets(rows | {"position_ids": self.positions})

    def _flat(self) -> dict[str, Any]:
        lengths = self.real.sum(dim=1)
        bounds = torch.nn.functional.pad(lengths[lengths > 0].cumsum(0), (1, 0)).to(torch.int32)
        rows = self._padded()
        rows.pop("attention_mask", None)
        flat = {key: value.expand(*self.shape, *value.shape[2:])[self.real][None] for key, value in rows.items()}
        return flat | {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}

    def _with_targets(self, rows: dict[str, Any]) -> dict[str, Any]:
        return rows if self.targets is None else rows | {"shift_labels": self.targets}

    def _is_of_tokens(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() >= 2 and tuple(value.shape[:2]) == self.shape

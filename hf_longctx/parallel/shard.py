"""One batch, cut along its tokens: full rows in, one rank's share out.

What: `shard_batch` is the one named, visible step between a collated batch and `model(**batch)`. Labels are shifted
over the whole row first and cut afterwards, so the last token of a shard keeps its target. Rows are padded to a
multiple of `P` with one pad segment that no token attends to and no loss counts.

How: everything that attention must know about the whole row (documents, padding) travels in a `SequenceShard`, the
model keyword argument `sequence_shard`. Price: `B x T` 32-bit integers per rank when rows are packed or padded,
nothing otherwise.
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from .adapted import adapted_for
from .collectives import gather_integers
from .full_rows import validate_full_rows
from .mesh import SequenceMesh
from .position_planes import has_planes, rotary_positions, text_positions
from .segments import DOCUMENT_BOUND_KEYS, has_documents, position_facts, positions_of, segment_rows
from .stopwatch import Stopwatch


logger = logging.getLogger(__name__)

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """The facts of one sharded batch, for one forward and backward.

    Args:
        size (`int`): ranks that share each row, `P`.
        rank (`int`): which share is mine.
        num_tokens (`int`): tokens of a row before padding to a multiple of `P`.
        local_len (`int`): tokens of a row on this rank, `t`; the padded row has `P * t`.
        segment_ids (`torch.Tensor` of shape `(B, T)`, *optional*): the document of every token of the whole
            row, -1 for padding; `None` if each row is one document with no padding. Tokens attend within their segment
            only.
        only_right_padding (`bool`): each row is one document followed by padding, so a causal kernel needs no mask.
        inner_attention (`str`): the kernel that `"ulysses"` runs.
        has_own_positions (`bool`): `position_ids` are the batch's or, on one process, counted by the model; otherwise
            they were added and count from 0 in each document.
        num_positions (`int`, *optional*): one more than the largest position of the whole rows.
        document_lengths (`torch.Tensor` of shape `(B, T)`, *optional*): the same of every token's document, if
            positions do not begin at 0 in each.
        batch_weight (`float`): by what a rank multiplies a term of the whole rows that is no mean over tokens, such
            as the loss of routers, so that it counts once for each group: the number of groups, over which wrappers
            average, or less where a trainer multiplies the loss itself.
        row_hash (`int`): checksum of the full rows, equal on the ranks of a group.
        group (`ProcessGroup`, *optional*): the `sp` axis; bound in the main process, since it cannot leave a data
            worker.
        stopwatch ([`Stopwatch`], *optional*): times the collectives of this batch.
        readers (`set` of `int`): the `id` of every attention layer that read this shard, so that one which did not can
            be found.
    """

    size: int
    rank: int
    num_tokens: int
    local_len: int
    segment_ids: torch.Tensor | None = None
    only_right_padding: bool = True
    inner_attention: str = "auto"
    has_own_positions: bool = False
    num_positions: int | None = None
    document_lengths: torch.Tensor | None = None
    batch_weight: float = 1.0
    row_hash: int = 0
    group: dist.ProcessGroup | None = field(default=None, repr=False)
    stopwatch: Stopwatch | None = field(default=None, repr=False)
    readers: set[int] = field(default_factory=set, repr=False)

    @property
    def num_local_tokens(self) -> int:
        """Tokens of a row on this rank that are not the pad segment added for divisibility."""
        return min(max(self.num_tokens - self.rank * self.local_len, 0), self.local_len)

    @cached_property
    def kernel_plans(self) -> dict:
        """What each mask rule became for the inner kernel: built once per batch and shared by its layers."""
        return {}

    @cached_property
    def derived(self) -> dict:
        """What layers without a kernel derive from these facts, such as where documents begin: once per batch."""
        return {}

    @cached_property
    def layer_plans(self) -> dict:
        """What layers other than attention did with the batch: functions that say it in words."""
        return {}

    def bind(self, mesh: SequenceMesh) -> SequenceShard:
        """The same facts with this process's `sp` group, ready for the model."""
        weight = float(mesh.data_parallel_size)
        return dataclasses.replace(self, group=mesh.sp_group, batch_weight=weight, readers=set())

    def to(self, device: torch.device | str, **kwargs) -> SequenceShard:
        """The same facts on `device`, so that the trainers' device placement moves a shard like a tensor."""
        facts = {"segment_ids": self.segment_ids, "document_lengths": self.document_lengths}
        moved = {name: fact.to(device, **kwargs) for name, fact in facts.items() if fact is not None}
        return dataclasses.replace(self, **moved) if moved else self


def shard_batch(
    batch: Mapping[str, Any],
    mesh: SequenceMesh,
    model: torch.nn.Module | None = None,
    *,
    inner_attention: str | None = None,
    shift_labels: bool | None = None,
    check_rows: bool = True,
) -> dict[str, Any]:
    """Cut full rows to my share, ready for `model(**batch)`.

    Args:
        batch (`Mapping`): collated full rows: `input_ids` (or `inputs_embeds`), and optionally `labels`,
            `attention_mask`, `position_ids`, `token_type_ids`, packed bounds (`cu_seq_lens_*`), each of shape `(B, T,
            ...)`; for a `model` with multimodal rotary positions also `position_ids` of shape `(3, B, T)` or, with
            those of the text first, `(4, B, T)`. Every rank of a group passes the same rows.
        mesh ([`SequenceMesh`]): the axes of the run.
        model (`torch.nn.Module`, *optional*): the model that gets the share, wrapped or not, after
            [`adapt`][hf_longctx.adapt]. It decides the two arguments below, and a model that was not adapted is
            refused. Without it, its attention layers refuse what they can see.
        inner_attention (`str`, *optional*): see [`LongContextConfig`]; unset, the model's or `"auto"`.
        shift_labels (`bool`, *optional*): the model predicts the next token. `False` for a masked language model,
            whose labels stand at their own position. Unset, the model's or `True`.
        check_rows (`bool`, *optional*, defaults to `True`): compare a checksum of the rows within the group.

    Returns:
        `dict`: each tensor cut to `(B, t, ...)` with `t = ceil(T / P)`, plus `position_ids`, `sequence_shard` and,
        with labels, `shift_labels` and `num_items_in_batch`. The model's loss on rank `r` is then `P * S_r / N`, with
        `S_r` the sum over its valid tokens and `N` the valid tokens of the full rows: its mean over the group is the
        loss of one process.

    Raises:
        ValueError: the batch is already sharded, packs documents and pads at once, or has a tensor without a token
            dimension; or an argument that is not the model's.
        NotImplementedError: the batch holds images, a 4-D mask, or 3-D positions that no `model` is known to take.
        RuntimeError: the ranks of the group hold different rows, or the model was not adapted on such a mesh.

    Communication: with `check_rows`, one all-gather of 8 bytes per rank.
    Gradient: none; it moves integers, and `inputs_embeds` keeps its gradient on the kept slice.
    """
    position_axes: int | None = None
    if model is not None:
        adapted = adapted_for(model, mesh.sequence_parallel_size)
        _validate_chosen("inner_attention", inner_attention, adapted.inner_attention)
        _validate_chosen("shift_labels", shift_labels, adapted.shifts_labels)
        inner_attention, position_axes = adapted.inner_attention, adapted.position_axes
        shift_labels = shift_labels if adapted.shifts_labels is None else adapted.shifts_labels
    elif mesh.sequence_parallel_size > 1 and "adapted" not in mesh.noted:
        mesh.noted.add("adapted")
        logger.warning(
            "no model was adapted for rows of %d ranks, so a model whose layers never see the shard, or whose loss is "
            "not a sum over tokens, trains on wrong numbers unnoticed: call `hf_longctx.adapt(model, mesh)` once "
            "after loading.",
            mesh.sequence_parallel_size,
        )
    return share_of_group(
        batch,
        mesh,
        inner_attention="auto" if inner_attention is None else inner_attention,
        shift_labels=True if shift_labels is None else shift_labels,
        check_rows=check_rows,
        position_axes=position_axes,
    )


def _validate_chosen(name: str, given: object, models: object) -> None:
    if None not in (given, models) and given != models:
        raise ValueError(
            f"`{name}` ({given!r}) is not what the model was adapted with ({models!r}): leave it out, or adapt the "
            "model anew."
        )


def share_of_group(
    batch: Mapping[str, Any],
    mesh: SequenceMesh,
    *,
    inner_attention: str,
    shift_labels: bool,
    check_rows: bool = True,
    position_axes: int | None = None,
) -> dict[str, Any]:
    """[`shard_batch`] for a model that is known to take it, or is about to be checked."""
    size, rank = mesh.sequence_parallel_size, mesh.sequence_parallel_rank
    settings: dict[str, Any] = {"inner_attention": inner_attention, "shift_labels": shift_labels}
    share = cut_batch(batch, size, rank, position_axes=position_axes, **settings)
    shard = share["sequence_shard"].bind(mesh)
    if check_rows:
        validate_same_rows(shard)
    share["sequence_shard"] = shard
    if batch.get("labels") is not None:
        full = batch.get("shift_labels", batch["labels"][:, 1:] if shift_labels else batch["labels"])
        share["num_items_in_batch"] = max(int((full != IGNORE_INDEX).sum()), 1) / size
    return share


def cut_batch(
    batch: Mapping[str, Any],
    size: int,
    rank: int,
    *,
    inner_attention: str = "auto",
    shift_labels: bool = True,
    position_axes: int | None = None,
) -> dict[str, Any]:
    """Rank `rank` of `size`'s share of full rows, as plain facts: no process group, safe in a data worker.

    See [`shard_batch`] for the arguments and errors; `position_axes` is that of
    [`position_axes`][hf_longctx.families.position_axes], or `None` where no model is known. Communication: none.
    """
    rows, num_tokens, device = validate_full_rows(batch, position_axes)
    local_len = -(-num_tokens // size)
    documents = {**batch, "position_ids": text_positions(batch, position_axes)}
    segments, only_right_padding = segment_rows(documents, rows, num_tokens, device)
    padding = local_len * size - num_tokens
    full = {key: value for key, value in batch.items() if key not in DOCUMENT_BOUND_KEYS}
    # One process counts its whole rows itself, in its own way; across documents and on a share it would be wrong.
    counts_itself = size == 1 and not has_documents(segments)
    has_own_positions = full.get("position_ids") is not None or counts_itself
    if not has_own_positions:
        full["position_ids"] = positions_of(segments, num_tokens, device)
    if padding and full.get("attention_mask") is None:
        full["attention_mask"] = torch.ones(rows, num_tokens, dtype=torch.long, device=device)
    if full.get("labels") is not None and shift_labels and "shift_labels" not in full:
        full["shift_labels"] = torch.nn.functional.pad(full["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]

    share: dict[str, Any] = {}
    for key, value in full.items():
        if value is None:
            continue
        if key == "position_ids" and has_planes(value):
            planes = value.expand(-1, rows, -1)
            value = torch.stack([_cut(plane, rank, local_len, 0) for plane in planes])
        elif isinstance(value, torch.Tensor) and value.dim() >= 2:
            value = value.expand(rows, *value.shape[1:])
            fill = IGNORE_INDEX if key in ("labels", "shift_labels") else 0
            value = _cut(value, rank, local_len, fill)
        share[key] = value
    share["sequence_shard"] = SequenceShard(
        size=size,
        rank=rank,
        num_tokens=num_tokens,
        local_len=local_len,
        segment_ids=segments,
        only_right_padding=only_right_padding,
        inner_attention=inner_attention,
        has_own_positions=has_own_positions,
        **position_facts(segments, rotary_positions(full.get("position_ids"), position_axes)),
        row_hash=_hash(batch),
    )
    return share


def validate_same_rows(shard: SequenceShard) -> None:
    """Raise `RuntimeError` if the ranks of a group hold different rows. Communication: one all-gather of 8 bytes."""
    hashes = gather_integers(shard.row_hash, shard.group)
    if len(set(hashes)) > 1:
        raise RuntimeError(
            f"the {shard.size} ranks of one sequence-parallel group drew different rows (checksums {hashes}): they "
            "must read the same data in the same order; split the data set by `mesh.data_parallel_rank`, not by the "
            "process rank, and seed a random collator by it."
        )


def _cut(value: torch.Tensor, rank: int, local_len: int, fill: int) -> torch.Tensor:
    start = rank * local_len
    piece = value[:, start : start + local_len]
    missing = local_len - piece.shape[1]
    if missing:
        pads = [0, 0] * (value.dim() - 2) + [0, missing]
        piece = torch.nn.functional.pad(piece, pads, value=fill)
    return piece.contiguous()


def _hash(batch: Mapping[str, Any]) -> int:
    row_hash = 0
    for key in ("input_ids", "inputs_embeds", "labels", "attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx"):
        value = batch.get(key)
        if isinstance(value, torch.Tensor):
            row_hash = zlib.crc32(f"{key}{tuple(value.shape)}".encode(), row_hash)
            row_hash = zlib.crc32(value.detach().cpu().contiguous().view(torch.uint8).numpy(), row_hash)
    return row_hash

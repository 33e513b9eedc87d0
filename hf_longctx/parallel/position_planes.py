"""`position_ids` with planes in front, `(planes, rows, tokens)`: what a multimodal rotary embedding takes.

A model has one plane for each axis of its rotary embedding, and may get one more, the first, with the positions of the
text; see [`position_axes`][hf_longctx.families.position_axes]. How many axes a model has decides what such a tensor
means: its shape cannot, since `(3, rows, tokens)` and `(rows, tokens, 3)` of three rows of three tokens are one shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .segments import DOCUMENT_BOUND_KEYS, positions_of


def has_planes(positions: object) -> bool:
    """Whether `position_ids` have more than rows and tokens."""
    return isinstance(positions, torch.Tensor) and positions.dim() == 3


def validate_planes(positions: torch.Tensor, rows: int, num_tokens: int, axes: int | None) -> None:
    """Refuse planes that the model does not take, or that nobody can tell from rows.

    Args:
        positions (`torch.Tensor`): three dimensions.
        rows, num_tokens (`int`): of the batch.
        axes (`int`, *optional*): of the model's rotary embedding, 0 for one without planes; `None`: not known.

    Raises:
        NotImplementedError: there is no model to say what they mean, or it takes none.
        ValueError: they are not the model's planes, or not of these rows.
    """
    shape = tuple(positions.shape)
    if axes is None:
        raise NotImplementedError(
            f"`position_ids` has shape {shape}, and nothing says which model they are for: 3-D multimodal rotary "
            "positions are cut for an adapted model only, `shard_batch(batch, mesh, model)`; or pass 2-D positions "
            "of shape (rows, tokens)."
        )
    if axes == 0:
        raise NotImplementedError(
            f"`position_ids` has shape {shape}, but the model has no 3-D multimodal rotary positions: pass 2-D "
            "positions of shape (rows, tokens)."
        )
    if shape[0] not in (axes, axes + 1) or shape[1] not in (rows, 1) or shape[2] != num_tokens:
        raise ValueError(
            f"`position_ids` has shape {shape}, but the rotary embedding of this model has {axes} axes: pass "
            f"({axes}, {rows}, {num_tokens}), or ({axes + 1}, {rows}, {num_tokens}) with the text positions first."
        )


def text_positions(batch: Mapping[str, Any], axes: int | None) -> torch.Tensor | None:
    """The positions, `(rows, tokens)`, that say where the documents of a batch begin; `None` if none do.

    With a plane for the text, that one. Without it, planes that are all alike are those of a text: a document begins
    where they restart, and one that only skips ahead is whole, as it is to transformers. Planes that differ are those
    of images, and tell none.

    Args:
        batch (`Mapping`): full rows, with planes that fit the model, or without.
        axes (`int`, *optional*): see [`validate_planes`].

    Raises:
        NotImplementedError: planes of images restart within a row, and no bounds say what that means.
    """
    positions: Any = batch.get("position_ids")
    if not has_planes(positions):
        return positions
    if axes is None or positions.shape[0] == axes + 1:
        return positions[0]
    steps = positions[0].diff(dim=-1)
    if bool((positions == positions[:1]).all()):
        begins = torch.nn.functional.pad(steps <= 0, (1, 0), value=True)
        return positions_of(begins.cumsum(dim=1), positions.shape[-1], positions.device)
    if any(batch.get(name) is not None for name in DOCUMENT_BOUND_KEYS):
        return None
    mask = batch.get("attention_mask")
    restarts = steps < 0 if mask is None else (steps < 0) & mask[:, 1:].bool() & mask[:, :-1].bool()
    if bool(restarts.any()):
        raise NotImplementedError(
            f"the first plane of `position_ids`, of shape {tuple(positions.shape)}, restarts within a row and the "
            "planes differ, so whether a new document begins there cannot be told: put the text positions in front, "
            f"({axes + 1}, rows, tokens), or pass `cu_seq_lens_q` and `cu_seq_lens_k`."
        )
    return None


def rotary_positions(positions: torch.Tensor | None, axes: int | None) -> torch.Tensor | None:
    """For every token the largest position that is rotated, `(rows, tokens)`."""
    if positions is None or not has_planes(positions):
        return positions
    return positions[1 if positions.shape[0] == (axes or 0) + 1 else 0 :].amax(dim=0)

"""A batch of full rows, looked at before it is cut: one entry a token, as tensors, and nothing that cannot be cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..families import MULTIMODAL_INPUTS
from .position_planes import has_planes, validate_planes
from .segments import DOCUMENT_BOUND_KEYS


_TOKEN_KEYS = ("input_ids", "inputs_embeds", "labels", "shift_labels", "attention_mask", "position_ids", "seq_idx")


def validate_full_rows(batch: Mapping[str, Any], position_axes: int | None = None) -> tuple[int, int, torch.device]:
    """Refuse what cannot be cut; see [`shard_batch`] for the errors.

    Returns:
        tuple of the rows, the tokens of a row, and where they are.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"`batch` is a `{type(batch).__name__}`, but a batch is a mapping from names to tensors.")
    if "sequence_shard" in batch:
        raise ValueError("`batch` is already sharded (it has `sequence_shard`): shard full rows, once.")
    tokens = batch.get("input_ids") if batch.get("input_ids") is not None else batch.get("inputs_embeds")
    if tokens is None:
        raise ValueError(f"`batch` ({', '.join(batch)}) needs `input_ids` or `inputs_embeds` of shape (rows, tokens).")
    _validate_tensors(batch, len(tokens[0]) if len(tokens) else 0)
    rows, num_tokens = tokens.shape[:2]
    for key, value in batch.items():
        if value is not None and any(mark in key for mark in MULTIMODAL_INPUTS):
            raise NotImplementedError(
                f"`{key}` belongs to an image, video or audio input, which `ulysses` does not shard: train the text "
                "model alone, or set `sequence_parallel_size` to 1."
            )
        if not isinstance(value, torch.Tensor) or key in DOCUMENT_BOUND_KEYS:
            continue
        if key == "position_ids" and has_planes(value):
            validate_planes(value, rows, num_tokens, position_axes)
            continue
        if key == "attention_mask" and value.dim() != 2:
            raise NotImplementedError(
                f"`attention_mask` has shape {tuple(value.shape)}: a hand-made mask cannot be cut by heads; pass a "
                "2-D padding mask, or `position_ids` that restart at each document."
            )
        fits = value.dim() >= 2 and value.shape[1] == num_tokens and value.shape[0] in (rows, 1)
        if not fits and value.dim() > 0:
            raise ValueError(
                f"`{key}` has shape {tuple(value.shape)}, but a sharded batch needs ({rows}, {num_tokens}, ...), one "
                "entry a token: drop the key, or give it a token dimension."
            )
    return rows, num_tokens, tokens.device


def _validate_tensors(batch: Mapping[str, Any], num_tokens: int) -> None:
    """Refuse rows of tokens that are no tensors: they would not be cut."""
    for key, value in batch.items():
        if isinstance(value, (list, tuple)):
            is_rows = bool(value) and all(isinstance(row, (list, tuple)) and len(row) == num_tokens for row in value)
        else:
            is_rows = getattr(value, "shape", (0,))[1:2] == (num_tokens,)
        if not isinstance(value, (torch.Tensor, type(None))) and (key in _TOKEN_KEYS or is_rows):
            raise ValueError(
                f"`{key}` is a `{type(value).__name__}`, but rows are cut as tensors: let the collator return "
                "`torch.Tensor`s, for example `torch.as_tensor(...)`."
            )

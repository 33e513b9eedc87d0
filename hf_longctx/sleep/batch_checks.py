"""What of a batch sleep takes: whole rows from their first token, padded on the right if at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..attention.cache_names import CACHE_NAMES


_TAKEN = ("input_ids", "labels", "attention_mask", "position_ids", "sleep_windows", "num_items_in_batch")
# Without a meaning here: what transformers' trainers and collators pass beside, and what asks for an ordinary output.
_IGNORED = ("return_dict", "return_loss")
_PACKED = (
    "sequence_shard",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "cu_seqlens",
)


def check_batch(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Refuse what sleep does not take.

    Returns:
        `tuple`: tokens, labels, and what else goes to the model's layers as it is.

    Raises:
        ValueError: rows start late, are packed, or have no label; a name is not known.
        NotImplementedError: a loss of routers, hidden states or attentions are asked for.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"`batch` (a `{type(batch).__name__}`) must map names to tensors, such as `input_ids`.")
    tokens, labels = batch.get("input_ids"), batch.get("labels")
    if tokens is None:
        raise ValueError("a batch that sleeps needs `input_ids`: its first pass looks them up, later ones do not.")
    if batch.get("use_cache") is False:
        raise ValueError("`use_cache` (False) leaves nowhere to put the states of a window: leave it out.")
    check_rows(tokens, batch)
    if labels is None:
        raise ValueError("a batch without `labels` has no loss: add them, with -100 where there is none.")
    if labels.shape != tokens.shape:
        raise ValueError(f"`labels` {tuple(labels.shape)} must have the shape of `input_ids` {tuple(tokens.shape)}.")
    mask = batch.get("attention_mask")
    padded = [] if mask is None else ((labels != -100) & (mask == 0)).any(dim=1).nonzero()[:, 0].tolist()
    if padded:
        raise ValueError(
            f"row {padded[0]} has labels where `attention_mask` is 0, on padding that no window reads as such: set "
            "them to -100."
        )
    empty = (labels[:, 1:] == -100).all(dim=1).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"row {empty[0]} has no label behind its first token, so no window of it is awake and it has no loss: "
            "drop it, or label its answer."
        )
    return tokens, labels, _arguments(batch)


def check_rows(tokens: torch.Tensor, batch: Mapping[str, Any]) -> None:
    """Refuse rows that are padded on the left, packed, or begun elsewhere."""
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        value = tokens if name == "input_ids" else batch.get(name)
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"`{name}` (a `{type(value).__name__}`) must be a tensor: sleep cuts it into windows.")
        if value is not None and name in ("input_ids", "labels") and value.is_floating_point():
            raise ValueError(
                f"`{name}` ({value.dtype}) must be whole numbers, such as `torch.long`: they name tokens."
            )
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"`input_ids` {tuple(tokens.shape)} must be of shape (rows, tokens), with a token or more.")
    for name in _PACKED:
        if batch.get(name) is not None:
            raise ValueError(
                f"the batch has `{name}`, so its rows are packed or shared, but windows are counted from a row's "
                "start and states are not reset inside it: give every document a row of its own."
            )
    mask = batch.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(f"`attention_mask` has {mask.dim()} dimensions: sleep takes one of shape (rows, tokens).")
        if mask.shape != tokens.shape:
            raise ValueError(
                f"`attention_mask` {tuple(mask.shape)} must have the shape of `input_ids` {tuple(tokens.shape)}."
            )
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            row = int((mask[:, 1:] > mask[:, :-1]).any(dim=1).nonzero()[0])
            raise ValueError(
                f"row {row} is padded on the left or in between, and its padding would stand in its windows: pad on "
                "the right."
            )
    positions = batch.get("position_ids")
    if positions is not None and positions.shape[-1:] != tokens.shape[1:]:
        raise ValueError(
            f"`position_ids` {tuple(positions.shape)}, or the `attention_mask` that `generate` counts them from, must "
            f"have one entry for each token of `input_ids` {tuple(tokens.shape)}."
        )
    if positions is not None:
        expected = torch.arange(tokens.shape[1], device=positions.device)
        real = positions == expected
        if mask is not None and positions.shape == mask.shape:
            real = real | (mask.to(positions.device) == 0)
        if not bool(real.all()):
            raise ValueError(
                "`position_ids` do not count a row's tokens from 0: packed rows and rows that were begun elsewhere do "
                "not sleep; give every document a row of its own."
            )


def _arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    others = {
        name: value
        for name, value in batch.items()
        if name not in (*_TAKEN, *_IGNORED, *_PACKED, "use_cache") and value is not None
    }
    if others.get("output_router_logits"):
        raise NotImplementedError(
            "`output_router_logits` (True) adds a loss of the routers that N passes would count N times: leave it out."
        )
    others.pop("output_router_logits", None)
    for name in ("output_hidden_states", "output_attentions"):
        if others.pop(name, False):
            raise NotImplementedError(
                f"the batch has `{name}` (True), which is of one pass, and a window has several: leave it out."
            )
    for name in ("logits_to_keep", *CACHE_NAMES):
        if name in others:
            raise ValueError(
                f"the batch has `{name}`, which a row that sleeps chooses itself, window by window: leave it out."
            )
    if others.get("is_causal") is False:
        raise ValueError("the batch has `is_causal` (False), and a row that sleeps is read in order: leave it out.")
    for name, value in others.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            raise ValueError(
                f"the batch has `{name}`, which sleep would have to cut into windows and does not know: leave it out."
            )
    return others

"""Which document every token of a row belongs to, read from whatever the batch brings: a mask, packed bounds or
positions.

Documents and padding become one thing, segments: tokens attend within their segment, and padding (-1) to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


PAD_SEGMENT = -1
# Facts about the whole row that other kernels need; the segments replace them.
DOCUMENT_BOUND_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "seq_lengths")


def segment_rows(
    batch: Mapping[str, Any], rows: int, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor | None, bool]:
    """The document of every token.

    Returns:
        tuple of `(B, T)` 32-bit segment ids (-1 for padding) or `None` for whole rows, and whether each row is one
        document with padding on the right only.

    Raises:
        ValueError: documents and a mask at once, bounds that do not describe the rows, or positions that are no whole
            numbers without a mask.
    """
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    valid = None if mask is None or bool(mask.all()) else mask.bool().expand(rows, -1)
    documents = _documents_from_bounds(batch, rows, num_tokens, device)
    if documents is None:
        documents = _documents_from_index(batch.get("seq_idx"), rows)
    if documents is None and positions is not None:
        documents = _documents_from_positions(positions.expand(rows, -1), valid, mask is not None)
    if documents is not None and mask is not None:
        raise ValueError(
            "the batch packs several documents in a row and also has an `attention_mask`: the mask would make the "
            "model ignore the document bounds; drop `attention_mask` and mark padding as a document of its own."
        )
    if valid is None:
        return documents, documents is None
    segments = torch.where(valid, 0, PAD_SEGMENT).to(torch.int32)
    only_right = bool((valid.long().diff(dim=1) <= 0).all())
    return segments, only_right


def has_documents(segments: torch.Tensor | None) -> bool:
    """Whether a row holds several documents; padding alone has no segment above 0."""
    return segments is not None and bool((segments > 0).any())


def positions_of(segments: torch.Tensor | None, num_tokens: int, device: torch.device) -> torch.Tensor:
    """Positions that a batch without `position_ids` gets: from 0 in each document; padding does not restart them.

    Returns:
        `torch.Tensor` of shape `(1, T)` for rows of one document each, else `(B, T)`, int64.
    """
    index = torch.arange(num_tokens, device=device)
    if segments is None or not has_documents(segments):
        return index[None]
    return index - torch.where(_begins(segments), index, 0).cummax(dim=1).values


def document_lengths(segments: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """For every token the length of its document: one more than the largest position in it.

    Args:
        segments (`torch.Tensor` of shape `(B, T)`): the document of every token.
        positions (`torch.Tensor` of shape `(B, T)`, *optional*): default: those that begin at 0 in every document.

    Returns:
        `torch.Tensor` of shape `(B, T)`, int64.
    """
    if positions is None:
        positions = positions_of(segments, segments.shape[1], segments.device)
    runs = _begins(segments).cumsum(dim=1) - 1
    return torch.zeros_like(runs).scatter_reduce(1, runs, positions.long() + 1, "amax").gather(1, runs)


def position_facts(segments: torch.Tensor | None, positions: torch.Tensor | None) -> dict[str, Any]:
    """What a shard keeps of the positions of whole rows, of which a rank sees its share.

    Args:
        segments (`torch.Tensor` of shape `(B, T)`, *optional*): the document of every token.
        positions (`torch.Tensor` of shape `(B, T)` or `(1, T)`, *optional*): of every token.
    """
    if positions is None or not positions.numel():
        return {}
    facts: dict[str, Any] = {"num_positions": int(positions.max()) + 1}
    if segments is not None and has_documents(segments):
        positions = positions.expand_as(segments)
        if not torch.equal(positions, positions_of(segments, segments.shape[1], segments.device)):
            facts["document_lengths"] = document_lengths(segments, positions)
    return facts


def _begins(segments: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(segments.diff(dim=1) != 0, (1, 0), value=True)


def _documents_from_bounds(
    batch: Mapping[str, Any], rows: int, num_tokens: int, device: torch.device
) -> torch.Tensor | None:
    given = [torch.as_tensor(batch[key]) for key in ("cu_seq_lens_q", "cu_seq_lens_k") if batch.get(key) is not None]
    if not given:
        return None
    bounds = given[0].to(device).long()
    fits = bounds.dim() == 1 and rows == 1 and len(bounds) > 1 and bool((bounds.diff() > 0).all())
    fits = fits and int(bounds[0]) == 0 and int(bounds[-1]) == num_tokens
    if not fits or not all(torch.equal(given[0], other) for other in given):
        raise ValueError(
            f"`cu_seq_lens_q` ({bounds.flatten().tolist()[:8]} ..., shape {tuple(bounds.shape)}) must rise from 0 to "
            f"the {num_tokens} tokens of one flattened row and equal `cu_seq_lens_k`, but the batch has {rows} "
            "row(s): flatten the batch, or pass `position_ids` that restart at each document."
        )
    if len(bounds) == 2:
        return None
    documents = torch.arange(len(bounds) - 1, dtype=torch.int32, device=device)
    return documents.repeat_interleave(bounds.diff())[None]


def _documents_from_index(index: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    if not isinstance(index, torch.Tensor) or bool((index == index[:, :1]).all()):
        return None
    return index.expand(rows, -1).to(torch.int32)


def _documents_from_positions(
    positions: torch.Tensor, valid: torch.Tensor | None, has_mask: bool
) -> torch.Tensor | None:
    """A new document starts where positions do not go up by one, which is how transformers reads packed rows.

    With a mask it reads none. Positions that only skip ahead (as in PoSE) then are those of one document; where they
    restart, the batch means documents, and the mask is refused.
    """
    steps = positions.diff(dim=1)
    if valid is not None:
        steps = torch.where(valid[:, 1:] & valid[:, :-1], steps, 1)
    restarts = torch.nn.functional.pad(steps != 1, (1, 0))
    if not bool(restarts.any()) or (has_mask and bool((steps > 0).all())):
        return None
    if positions.is_floating_point() and bool((positions != positions.round()).any()):
        raise ValueError(
            f"`position_ids` ({positions[0, :3].tolist()} ...) are no whole numbers, and without an `attention_mask` "
            "a document begins wherever they do not go up by one: pass an `attention_mask` of ones if a row is one "
            "document."
        )
    return restarts.cumsum(dim=1).to(torch.int32)

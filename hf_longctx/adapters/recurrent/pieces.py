"""Where the documents of a rank's tokens begin and end, and functions that run on them one by one.

A recurrence or a convolution must start anew at every document. Its tokens on this rank are cut into pieces of
documents; pieces of equal length go through one call. Only the first piece of a row may continue a document of the
ranks before, and only the last one may go on to the ranks after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ...attention.implicit_positions import packs_documents
from ...parallel.shard import SequenceShard


@dataclass(frozen=True, eq=False)
class SharePieces:
    """The pieces of documents that the tokens of one rank hold; made once per batch by [`pieces_of`].

    Args:
        shard ([`SequenceShard`]): the facts of the batch.
        documents (`torch.Tensor` of shape `(B, P * t)`): the document of every token of the whole rows, 0 for rows of
            one document each, which may be padded: transformers runs a recurrence over padding too, whose inputs it
            sets to 0. The tokens that make rows divisible are a document of their own where rows are packed.
        lengths (`tuple` of `tuple` of `int`): by row, the lengths of its pieces on this rank.
        continues (`tuple` of `bool`): by row, whether its first piece continues a document of the rank before.
    """

    shard: SequenceShard
    documents: torch.Tensor
    lengths: tuple[tuple[int, ...], ...]
    continues: tuple[bool, ...]

    @property
    def is_shared(self) -> bool:
        """Whether other ranks hold tokens of these rows."""
        return self.shard.size > 1

    @property
    def is_whole(self) -> bool:
        """Whether a function that knows nothing of ranks and documents is right as it is."""
        return not self.is_shared and all(len(row) == 1 for row in self.lengths)

    @property
    def passes_through(self) -> tuple[bool, ...]:
        """By row, whether a state that comes in leaves again: the rank's tokens are inside one document."""
        return tuple(len(row) == 1 and goes_on for row, goes_on in zip(self.lengths, self.continues))

    @cached_property
    def flat_lengths(self) -> tuple[int, ...]:
        """The lengths of all pieces, row after row."""
        return tuple(length for row in self.lengths for length in row)

    @cached_property
    def last_of_row(self) -> tuple[int, ...]:
        """Which of all pieces is the last of each row."""
        ends = torch.tensor([len(row) for row in self.lengths]).cumsum(0) - 1
        return tuple(ends.tolist())

    @cached_property
    def continued_tokens(self) -> torch.Tensor:
        """Which tokens of this rank belong to a document of the rank before, boolean of shape `(B, t)`."""
        index = torch.arange(self.shard.local_len)
        firsts = torch.tensor([row[0] if goes_on else 0 for row, goes_on in zip(self.lengths, self.continues)])
        return (index < firsts[:, None]).to(self.documents.device)

    def in_words(self) -> str:
        """How many documents the whole rows hold, and of which lengths."""
        kept = self.documents[:, : self.shard.num_tokens].cpu()
        lengths = [length for row in kept for length in row.unique_consecutive(return_counts=True)[1].tolist()]
        if len(lengths) == len(kept):
            return f"one document of {self.shard.num_tokens:,} tokens a row"
        return f"{len(lengths):,} segments of {min(lengths):,} to {max(lengths):,} tokens"


def pieces_of(shard: SequenceShard, rows: int, device: torch.device) -> SharePieces:
    """The pieces of a rank's tokens, from its shard; one integer a token is read, once per batch."""
    if "pieces" not in shard.derived:
        shard.derived["pieces"] = _cut(shard, rows, device)
    return shard.derived["pieces"]


def pieces_of_whole_rows(pieces: SharePieces) -> SharePieces:
    """The pieces of the whole rows, without the tokens that make them divisible, for a rank that holds them."""
    shard = pieces.shard
    if "whole" not in shard.derived:
        documents = pieces.documents[:, : shard.num_tokens]
        lengths = tuple(tuple(row.unique_consecutive(return_counts=True)[1].tolist()) for row in documents.cpu())
        alone = SequenceShard(1, 0, shard.num_tokens, shard.num_tokens, shard.segment_ids)
        shard.derived["whole"] = SharePieces(alone, documents, lengths, (False,) * len(documents))
    return shard.derived["whole"]


def _cut(shard: SequenceShard, rows: int, device: torch.device) -> SharePieces:
    tokens, start = shard.local_len, shard.rank * shard.local_len
    if shard.segment_ids is None or not packs_documents(shard):
        documents = torch.zeros(rows, shard.size * tokens, dtype=torch.int32)
    else:
        fill = shard.size * tokens - shard.num_tokens
        documents = torch.nn.functional.pad(shard.segment_ids.cpu(), (0, fill), value=-1)
    mine = documents[:, start : start + tokens]
    lengths = tuple(tuple(row.unique_consecutive(return_counts=True)[1].tolist()) for row in mine)
    before = documents[:, start - 1] if start else torch.full((rows,), -2)
    continues = tuple((before == mine[:, 0]).tolist())
    return SharePieces(shard, documents.to(device), lengths, continues)


def run_pieces(
    pieces: SharePieces, function: Callable, *tensors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a function on every piece as if it were a row, those of equal length in one call.

    Args:
        pieces ([`SharePieces`]): of these rows.
        function (`Callable`): from tensors `(n, L, ...)` to one such tensor and a state `(n, ...)` or `None`, for any
            number `n` of rows and any length `L`.
        tensors (`torch.Tensor` of shape `(B, t, ...)`): its inputs.

    Returns:
        tuple of the outputs `(B, t, ...)` and the states after the last piece of each row, `(B, ...)`, or `None`.
    """
    rows, tokens = tensors[0].shape[:2]
    lengths = pieces.flat_lengths
    if len(lengths) == rows:
        return function(*tensors)
    flat = [tensor.flatten(0, 1).split(lengths) for tensor in tensors]
    outputs: list[torch.Tensor] = [tensors[0]] * len(lengths)
    states: list[torch.Tensor | None] = [None] * len(lengths)
    for length in sorted(set(lengths)):
        chosen = [index for index, other in enumerate(lengths) if other == length]
        output, state = function(*(torch.stack([parts[index] for index in chosen]) for parts in flat))
        for place, index in enumerate(chosen):
            outputs[index] = output[place]
            states[index] = None if state is None else state[place]
    joined = torch.cat(outputs).unflatten(0, (rows, tokens))
    last = [states[index] for index in pieces.last_of_row]
    return joined, None if last[0] is None else torch.stack(last)

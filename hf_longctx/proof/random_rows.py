"""The rows of a proof: short, ugly and random.

`dense`: rows of an odd length. `even`: rows that need no padding to be cut, so that no mask is ever made. `padded`:
one row padded on the left, one on the right. `packed`: documents that begin and end where they like, one of them a
single token. Labels are random tokens, not the inputs, and many are ignored.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..parallel.shard import IGNORE_INDEX


ROWS_OF_A_GROUP = 2
_LEAST_TOKENS = 23
_IGNORED = {"causal-lm": 0.2, "masked-lm": 0.6, "multimodal-lm": 0.2, "encoder": 0.0, "dpo": 0.2, "reward": 0.0}


@dataclass(frozen=True)
class Rows:
    """Full rows of all groups.

    Args:
        kind (`str`): `"dense"`, `"even"`, `"padded"` or `"packed"`.
        batch (`dict`): `input_ids` and `labels` of shape `(D * 2, T)`, and `attention_mask` (padded) or
            `position_ids` (packed).
        documents (`tuple`): `(row, start, stop)` of every document, for packed rows.
        shifts (`bool`): labels are the next tokens.
        counts_itself (`bool`): one process counts positions itself, as users of transformers let it.
    """

    kind: str
    batch: dict[str, torch.Tensor]
    documents: tuple[tuple[int, int, int], ...]
    shifts: bool
    counts_itself: bool = True

    @property
    def valid(self) -> torch.Tensor:
        """Real tokens, boolean `(D * 2, T)`."""
        mask = self.batch.get("attention_mask")
        return torch.ones_like(self.batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

    @property
    def num_items(self) -> int:
        """Trained tokens of all rows."""
        labels = self.batch["labels"]
        return int(((labels[:, 1:] if self.shifts else labels) != IGNORE_INDEX).sum())

    def of_group(self, group: int) -> dict[str, torch.Tensor]:
        """The rows of one data-parallel group."""
        first = group * ROWS_OF_A_GROUP
        return {name: value[first : first + ROWS_OF_A_GROUP] for name, value in self.batch.items()}

    def with_positions(self, start: int | None) -> Rows:
        """The same rows with `position_ids`, for a model that cannot count them on a share.

        Args:
            start (`int`, *optional*): position that the model gives to a first token. It then counts for itself, save
                in padded rows, where models differ and the batch decides. `None`: the batch always does.
        """
        ids = self.batch["input_ids"]
        counted = torch.arange(ids.shape[1]).expand(len(ids), -1).contiguous()
        positions = self.batch.get("position_ids", counted) + (start or 0)
        counts_itself = start is not None and self.kind != "padded"
        return dataclasses.replace(self, batch={**self.batch, "position_ids": positions}, counts_itself=counts_itself)

    def without_padding_targets(self) -> Rows:
        """The same rows without the targets that padding would predict."""
        labels, valid = self.batch["labels"].clone(), self.valid
        labels[:, 1:].masked_fill_(~valid[:, :-1], IGNORE_INDEX)
        return dataclasses.replace(self, batch={**self.batch, "labels": labels})


def num_tokens_of(kind: str, sequence_parallel_size: int) -> int:
    """Tokens of a row: a share for every rank and not the same for all, except for even rows."""
    shares = max(-(-_LEAST_TOKENS // sequence_parallel_size), 4) * sequence_parallel_size
    return shares if kind == "even" else shares - 1


def make_rows(
    kind: str,
    task: str,
    vocabulary: int,
    groups: int,
    num_tokens: int,
    first_token: int,
    shifts: bool,
    pads_left: bool = True,
) -> Rows:
    """Random rows of one kind; the same on every rank."""
    count = groups * ROWS_OF_A_GROUP
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randint(first_token, vocabulary, (count, num_tokens), generator=generator)
    ids, labels = draw(), draw()
    ignored = torch.rand(ids.shape, generator=generator) < _IGNORED[task]
    batch, documents = {"input_ids": ids}, []
    if kind == "padded":
        mask = torch.ones_like(ids)
        for row in range(count):
            padding = num_tokens // 3 if row % 2 == 0 else 2
            mask[row, slice(0, padding) if pads_left and row % 2 == 0 else slice(num_tokens - padding, None)] = 0
        batch["attention_mask"] = mask
        ignored |= mask == 0
    if kind == "packed":
        batch["position_ids"] = torch.zeros_like(ids)
        for row in range(count):
            first = num_tokens * 2 // 5 if row % 2 == 0 else 2
            bounds = (0, first, first + (1 if row % 2 == 0 else num_tokens * 2 // 3), num_tokens)
            for start, stop in zip(bounds, bounds[1:]):
                documents.append((row, start, stop))
                batch["position_ids"][row, start:stop] = torch.arange(stop - start)
        ignored |= batch["position_ids"] == 0  # no token of another document predicts a first one
    batch["labels"] = labels.masked_fill(ignored, IGNORE_INDEX)
    return Rows(kind, batch, tuple(documents), shifts)

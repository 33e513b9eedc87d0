"""Who meets whom in one round of LSH attention: blocks of sorted tokens, and the keys that each block looks at.

Tokens are sorted by document, bucket and position. In the causal layout a query sees the last tokens of its own
bucket, so nothing depends on what comes later. In the paper's layout the sorted tokens of each document are cut into
chunks, and a query sees its chunk and the one before, whatever their buckets. A round's first chunk looks back at
the last one of the round before, as in one long circle of all rounds: that is how transformers' Reformer computes it.

Tokens are numbered flat over the heads of a group, `T + 1` a head: the last number of a head is no token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..parallel.segments import PAD_SEGMENT


# Scores of a token with itself, which it only attends to if it sees nothing else; Reformer's number.
SELF_SCORE = -1e5
# Queries of a block in the causal layout, if the window is not smaller.
_BLOCK = 64


@dataclass(frozen=True)
class Round:
    """One round of some heads.

    Args:
        queries (`torch.Tensor` of shape `(blocks, g)`): flat numbers of tokens.
        keys (`torch.Tensor` of shape `(blocks, k)`): of the tokens that each block looks at.
        labels (`torch.Tensor`, *optional*): by flat number; tokens of different labels do not see each other.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    labels: torch.Tensor | None = None


class CausalBuckets:
    """A query sees the last `window` tokens of its own bucket in sorted order, the query included.

    If the rule is not causal it sees as many that come after. Nothing depends on later tokens under a causal rule.

    Args:
        segments (`torch.Tensor` of shape `(rows, T)`, *optional*): the document of every token, -1 for padding.
        num_tokens, window (`int`): `T` and how many.
        causal (`bool`): only keys at or before the query.
        device (`torch.device`): of the tokens.
    """

    def __init__(
        self, segments: torch.Tensor | None, num_tokens: int, window: int, causal: bool, device: torch.device
    ) -> None:
        self.documents, self.num_tokens = _numbered(segments), num_tokens
        window = max(min(window, num_tokens), 1)
        self.block = min(window, _BLOCK)
        self.blocks = -(-num_tokens // self.block)
        # In the first block of a row nothing is behind.
        self.behind = 0 if self.blocks == 1 else window
        self.ahead = 0 if causal or self.blocks == 1 else window
        place = torch.arange(self.block, device=device)[:, None] + self.behind
        distance = place - torch.arange(self.behind + self.block + self.ahead, device=device)
        self.outside = distance.abs() >= window
        if causal:
            self.outside |= distance < 0

    def rounds(self, buckets: torch.Tensor) -> Iterator[Round]:
        """Each round of a group of heads; `buckets` has the shape `(R, G, T)`."""
        documents = _of_heads(self.documents, buckets.shape[1])
        for each in buckets:
            labels = each.long() + documents
            order = _flat(labels.sort(dim=-1, stable=True).indices, self.num_tokens)
            nothing = _no_token(order, self.num_tokens)
            filled = self.blocks * self.block + self.ahead - self.num_tokens
            padded = torch.cat([nothing.expand(-1, self.behind), order, nothing.expand(-1, filled)], dim=1)
            keys = padded.unfold(1, self.behind + self.block + self.ahead, self.block)
            queries = keys[:, :, self.behind : self.behind + self.block]
            labels = torch.nn.functional.pad(labels, (0, 1), value=-1)
            yield Round(queries.flatten(0, 1), keys.flatten(0, 1), labels.flatten())

    def mask_scores(self, scores: torch.Tensor, round_: Round, piece: slice) -> None:
        """Set the scores `(blocks, g, k)` of what is not seen, and of a token with itself."""
        labels = round_.labels
        assert labels is not None
        theirs, mine = labels[round_.keys[piece]], labels[round_.queries[piece]]
        scores.masked_fill_((mine[:, :, None] != theirs[:, None]).logical_or_(self.outside), -torch.inf)
        self.of_itself(scores).fill_(SELF_SCORE)

    def clear_self(self, scores: torch.Tensor, round_: Round, piece: slice) -> None:
        """Set what belongs to a token with itself to zero."""
        self.of_itself(scores).zero_()

    def of_itself(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.diagonal(self.behind, dim1=1, dim2=2)


class ReformerChunks:
    """A query sees its chunk of its document's sorted tokens and the one before; if causal, what of them is not later.

    A document that is no longer than a chunk attends to itself. The grid of chunks begins anew in each document.

    Args: as of [`CausalBuckets`], of one row if it has segments; `window` tokens are a chunk.
    """

    def __init__(
        self, segments: torch.Tensor | None, num_tokens: int, window: int, causal: bool, device: torch.device
    ) -> None:
        self.documents, self.num_tokens, self.causal = _numbered(segments), num_tokens, causal
        self.block = max(min(window, num_tokens), 1)
        if self.documents is None:
            lengths = torch.tensor([num_tokens], device=device)
        else:
            # Padding has the largest number, documents any others.
            lengths = self.documents[0].sort().values.unique_consecutive(return_counts=True)[1]
        chunks = -(-lengths // self.block)
        starts = chunks.cumsum(0) - chunks
        self.blocks = int(chunks.sum())
        ranks = torch.arange(num_tokens, device=device)
        owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        # Where the n-th of the sorted tokens goes on the grid.
        self.slots = ranks - (lengths.cumsum(0) - lengths)[owner] + starts[owner] * self.block
        # The chunk before; the last of the round before, which stands `blocks` further on; or none (the very last).
        before = torch.arange(-1, self.blocks - 1, device=device)
        last = starts + chunks - 1 + self.blocks
        before[starts] = torch.where(chunks > 1, last, 2 * self.blocks)
        self.before = before
        self.is_one_chunk = self.blocks == 1

    def rounds(self, buckets: torch.Tensor) -> Iterator[Round]:
        """Each round of a group of heads; `buckets` has the shape `(R, G, T)`."""
        earlier = self._chunks(buckets[-1])
        for each in buckets:
            mine = self._chunks(each)
            if self.is_one_chunk:
                keys = mine
            else:
                nothing = mine.new_zeros(len(mine), 1, self.block) + _no_token(mine, self.num_tokens)[:, :, None]
                behind = torch.cat([mine, earlier, nothing], dim=1)[:, self.before]
                keys = torch.cat([behind, mine], dim=2)
            yield Round(mine.flatten(0, 1), keys.flatten(0, 1))
            earlier = mine

    def _chunks(self, buckets: torch.Tensor) -> torch.Tensor:
        """The tokens of every chunk, flat numbers of shape `(G, blocks, g)`."""
        labels = buckets.long() + _of_heads(self.documents, len(buckets))
        order = _flat(labels.sort(dim=-1, stable=True).indices, self.num_tokens)
        chunks = _no_token(order, self.num_tokens).repeat(1, self.blocks * self.block)
        chunks[:, self.slots] = order
        return chunks.view(len(order), self.blocks, self.block)

    def mask_scores(self, scores: torch.Tensor, round_: Round, piece: slice) -> None:
        """Set the scores `(blocks, g, k)` of what is not seen, and of a token with itself."""
        mine, theirs = round_.queries[piece][:, :, None], round_.keys[piece][:, None]
        if self.causal:
            scores.masked_fill_(theirs > mine, -torch.inf)
        else:
            scores.masked_fill_((theirs + 1) % (self.num_tokens + 1) == 0, -torch.inf)
        scores.masked_fill_(theirs == mine, SELF_SCORE)

    def clear_self(self, scores: torch.Tensor, round_: Round, piece: slice) -> None:
        """Set what belongs to a token with itself to zero."""
        scores.masked_fill_(round_.keys[piece][:, None] == round_.queries[piece][:, :, None], 0)


LAYOUTS = {"causal": CausalBuckets, "reformer": ReformerChunks}


def _numbered(segments: torch.Tensor | None) -> torch.Tensor | None:
    """Documents as whole numbers from 0, padding last: it is a document of its own."""
    if segments is None:
        return None
    segments = segments.long()
    return torch.where(segments == PAD_SEGMENT, segments.max() + 1, segments)


def _of_heads(documents: torch.Tensor | None, count: int) -> torch.Tensor | int:
    """What orders tokens of a group of `count` heads by document, before their buckets."""
    return 0 if documents is None else (documents << 32).repeat_interleave(count // len(documents), dim=0)


def _flat(order: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Places in a row of each head of a group, `(G, T)`, as flat numbers."""
    return order + torch.arange(len(order), device=order.device)[:, None] * (num_tokens + 1)


def _no_token(order: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The flat number of no token of each head, `(G, 1)`."""
    return torch.arange(1, len(order) + 1, device=order.device)[:, None] * (num_tokens + 1) - 1

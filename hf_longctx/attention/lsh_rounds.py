"""LSH attention on whole rows of some heads: a round at a time, forward and backward.

Rounds combine as if each weight were `exp(score - lse)` with one log-sum-exp over all rounds. So the backward needs
that number and the combined output alone, as in ring attention: a round is computed again, its weights are those of
the combination, and no gradient of a round's own log-sum-exp is ever needed. Memory does not grow with the rounds, but
for two bytes a token for their buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .drawn_dropout import drop_weights
from .lsh_layouts import LAYOUTS, Round


# Scores that are computed at a time: what fits the caches of a core, or keeps a GPU busy.
_SCORES_ON_CPU, _SCORES_ON_GPU = 2**18, 2**24
_EPSILON = 1e-6


@dataclass(frozen=True)
class Rounds:
    """What rounds are computed under.

    Args:
        layout (`str`), window (`int`): see [`LSHConfig`][hf_longctx.config.LSHConfig].
        causal (`bool`): keys at or before the query.
        scaling (`float`): factor of scores.
        segments (`torch.Tensor` of shape `(B, T)`, *optional*): the document of every token, -1 for padding.
        dropout (`float`): of each weight of each round.
        seed (`int`): of dropout.
        first_head (`int`): which of the layer's heads is the first.
    """

    layout: str
    window: int
    causal: bool
    scaling: float
    segments: torch.Tensor | None = None
    dropout: float = 0.0
    seed: int = 0
    first_head: int = 0

    def layout_of(self, rows: slice, num_tokens: int, device: torch.device):
        """The layout of some rows."""
        segments = None if self.segments is None else self.segments[rows].to(device)
        return LAYOUTS[self.layout](segments, num_tokens, self.window, self.causal, device)

    @property
    def rows_are_alike(self) -> bool:
        """Whether several rows can be computed at a time: the paper's grid depends on their documents."""
        return self.segments is None or self.layout == "causal"


def attend_rounds(query: torch.Tensor, value: torch.Tensor, buckets: torch.Tensor, rounds: Rounds) -> torch.Tensor:
    """Attention of shared queries and keys to the tokens that each round shows them.

    Args:
        query (`torch.Tensor` of shape `(B, n, T, H)`): keys are the same, each divided by its length.
        value (`torch.Tensor` of shape `(B, n, T, H_v)`).
        buckets (`torch.Tensor` of shape `(R, B, n, T)`): of every token in every round.
        rounds ([`Rounds`]): the rest.

    Returns:
        `torch.Tensor` of shape `(B, T, n, H_v)`.

    Gradient: of query and value, exact; hashing has none. It cannot be differentiated twice.
    Memory: saved are query, value, output, two numbers a token and head, and the buckets.
    """
    return _Rounds.apply(query, value, buckets, rounds)


class _Rounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, value, buckets, rounds: Rounds):
        rows, heads, tokens, _ = query.shape
        output = value.new_empty(rows, tokens, heads, value.shape[-1])
        wide = _wide(query.dtype)
        highest = torch.empty(rows, heads, tokens, dtype=wide, device=query.device)
        totals = torch.empty_like(highest)
        for group, layout in _groups(rounds, query):
            unit = _Unit(rounds, layout, group, query, value)
            found = unit.forward(buckets[(slice(None), *group)].flatten(1, 2))
            output.transpose(1, 2)[group] = unit.by_row(found).to(output.dtype)
            highest[group], totals[group] = unit.by_row(unit.highest), unit.by_row(unit.totals)
        ctx.rounds = rounds
        ctx.save_for_backward(query, value, buckets, output, highest, totals)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        query, value, buckets, output, highest, totals = ctx.saved_tensors
        of_query, of_value = torch.empty_like(query), torch.empty_like(value)
        for group, layout in _groups(ctx.rounds, query):
            unit = _Unit(ctx.rounds, layout, group, query, value)
            upstream, out = (x.transpose(1, 2)[group].flatten(0, 1) for x in (gradient, output))
            numbers = [x[group].flatten(0, 1) for x in (highest, totals)]
            found = unit.backward(buckets[(slice(None), *group)].flatten(1, 2), upstream, out, numbers)
            of_query[group], of_value[group] = map(unit.by_row, found)
        return of_query, of_value, None, None


def _groups(rounds: Rounds, query: torch.Tensor) -> Iterator[tuple[tuple[slice, slice], Any]]:
    """Rows and heads that are computed at a time: one head of a long row, several rows of short ones.

    The numbers of a head are those of products of its own blocks, whichever others are computed with it.
    """
    rows, heads, tokens, _ = query.shape
    if not tokens:
        return
    most = _SCORES_ON_GPU if query.device.type == "cuda" else _SCORES_ON_CPU
    count = max(1, most // (2 * tokens * min(rounds.window, tokens)))
    rows_at_once = max(1, count // heads) if rounds.rows_are_alike else 1
    for first in range(0, rows, rows_at_once):
        these = slice(first, min(first + rows_at_once, rows))
        layout = rounds.layout_of(these, tokens, query.device)
        for start in range(0, heads, count):
            yield (these, slice(start, min(start + count, heads))), layout


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(left: torch.Tensor, right: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """A batch of products, in the wide precision."""
    if left.dtype == wide:
        return torch.bmm(left, right)
    if left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=wide)
    return torch.bmm(left.to(wide), right.to(wide))


class _Unit:
    """Some heads of some rows: tensors by flat number, with a row of zeros for no token at the end of each head."""

    def __init__(self, rounds: Rounds, layout, group: tuple[slice, slice], query, value) -> None:
        self.rounds, self.layout, self.wide = rounds, layout, _wide(query.dtype)
        # Products in half precision are for tensor cores; elsewhere they are computed wide.
        self.narrow = query.dtype if query.device.type == "cuda" else self.wide
        self.group, self.num_tokens = group, query.shape[2]
        self.num_heads = group[1].stop - group[1].start
        vectors = query[group].flatten(0, 1).to(self.wide)
        self.inverse = (vectors.square().mean(-1, keepdim=True) + _EPSILON).rsqrt() * vectors.shape[-1] ** -0.5
        self.query = self._flat(vectors.to(self.narrow))
        self.key = self._flat((vectors * (self.inverse * rounds.scaling)).to(self.narrow))
        self.value = self._flat(value[group].flatten(0, 1).to(self.narrow))

    def by_row(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(G, T, ...)` by row and head."""
        return tensor.unflatten(0, (-1, self.num_heads))

    def _flat(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, 1)).flatten(0, 1)

    def _of_heads(self, flat: torch.Tensor) -> torch.Tensor:
        """By head and token, without the rows of no token."""
        return flat.unflatten(0, (-1, self.num_tokens + 1))[:, : self.num_tokens]

    def forward(self, buckets: torch.Tensor) -> torch.Tensor:
        """Outputs `(G, T, H_v)`, combined over all rounds; keeps `highest` and `totals` for the backward."""
        size = len(self.value)
        output = self.value.new_zeros(size, self.value.shape[-1], dtype=self.wide)
        highest = output.new_full((size,), -torch.inf)
        totals = output.new_zeros(size)
        for index, round_, piece in self._pieces(buckets):
            scores = self._scores(round_, piece)
            top = scores.amax(-1)
            weights = scores.sub_(top[:, :, None]).exp_()
            total = weights.sum(-1).flatten()
            kept = self._dropped(weights, index, round_, piece)
            seen = self._take(self.value, round_.keys[piece])
            part = _product(kept.to(self.narrow), seen, self.wide).flatten(0, 1)
            tokens, top = round_.queries[piece].flatten(), top.flatten()
            before = highest[tokens]
            above = torch.maximum(before, top)
            old, new = (before - above).exp(), (top - above).exp()
            output[tokens] = output[tokens] * old[:, None] + part * new[:, None]
            totals[tokens] = totals[tokens] * old + total * new
            highest[tokens] = above
        self.highest, self.totals = (self._of_heads(x[:, None])[..., 0] for x in (highest, totals))
        return self._of_heads(output) / self.totals[..., None]

    def backward(self, buckets, gradient, output, numbers) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of query and value, `(G, T, ...)`, from that of the combined output."""
        wide = self.wide
        gradient = gradient.to(wide)
        shares = self._flat((gradient * output.to(wide)).sum(-1, keepdim=True))[:, 0]
        highest, totals = (x[..., None] for x in numbers)
        # No token weighs nothing.
        highest = torch.nn.functional.pad(highest, (0, 0, 0, 1), value=torch.inf).flatten()
        totals = torch.nn.functional.pad(totals, (0, 0, 0, 1), value=1.0).flatten()
        gradient = self._flat(gradient.to(self.narrow))
        of_query, of_key = (torch.zeros(self.query.shape, dtype=wide, device=self.query.device) for _ in range(2))
        of_value = torch.zeros(self.value.shape, dtype=wide, device=self.value.device)
        for index, round_, piece in self._pieces(buckets):
            scores = self._scores(round_, piece)
            queries, keys = round_.queries[piece], round_.keys[piece]
            weights = scores.sub_(highest[queries][:, :, None]).exp_().div_(totals[queries][:, :, None])
            upstream, seen = self._take(gradient, queries), self._take(self.value, keys)
            kept = self._dropped(weights, index, round_, piece).to(self.narrow)
            of_value.index_add_(0, keys.flatten(), _product(kept.mT, upstream, wide).flatten(0, 1))
            of_weights = self._dropped(_product(upstream, seen.mT, wide), index, round_, piece)
            of_scores = of_weights.sub_(shares[queries][:, :, None]).mul_(weights)
            self.layout.clear_self(of_scores, round_, piece)
            of_scores = of_scores.to(self.narrow)
            of_query.index_add_(0, queries.flatten(), self._back(of_scores, self.key, keys))
            of_key.index_add_(0, keys.flatten(), self._back(of_scores.mT, self.query, queries))
        return self._through_length(of_query, of_key), self._of_heads(of_value)

    def _through_length(self, of_query: torch.Tensor, of_key: torch.Tensor) -> torch.Tensor:
        """The gradient of the query, that of the keys included, which are queries divided by their lengths."""
        of_key = self._of_heads(of_key) * self.rounds.scaling
        unit = self._of_heads(self.query).to(self.wide) * self.inverse
        along = (unit * of_key).sum(-1, keepdim=True)
        return self._of_heads(of_query) + self.inverse * (of_key - along * unit)

    def _pieces(self, buckets: torch.Tensor) -> Iterator[tuple[int, Round, slice]]:
        """Blocks of each round that are computed at a time."""
        most = _SCORES_ON_GPU if self.query.device.type == "cuda" else _SCORES_ON_CPU
        for index, round_ in enumerate(self.layout.rounds(buckets)):
            blocks, queries = round_.queries.shape
            count = max(1, most // (queries * round_.keys.shape[1]))
            for start in range(0, blocks, count):
                yield index, round_, slice(start, start + count)

    def _scores(self, round_: Round, piece: slice) -> torch.Tensor:
        queries, keys = self._take(self.query, round_.queries[piece]), self._take(self.key, round_.keys[piece])
        scores = _product(queries, keys.mT, self.wide)
        self.layout.mask_scores(scores, round_, piece)
        return scores

    @staticmethod
    def _take(flat: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return flat.index_select(0, tokens.flatten()).view(*tokens.shape, -1)

    def _back(self, of_scores: torch.Tensor, flat: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return _product(of_scores, self._take(flat, tokens), self.wide).flatten(0, 1)

    def _dropped(self, weights: torch.Tensor, index: int, round_: Round, piece: slice) -> torch.Tensor:
        """The weights that dropout keeps, by what they are for: the same in the backward and on every rank."""
        if not self.rounds.dropout:
            return weights
        size = self.num_tokens + 1
        queries, keys = round_.queries[piece][:, :, None], round_.keys[piece][:, None]
        unit, which = queries // size, torch.tensor(index, device=weights.device)
        row = unit // self.num_heads + self.group[0].start
        head = unit % self.num_heads + self.group[1].start + self.rounds.first_head
        return drop_weights(
            weights, self.rounds.dropout, self.rounds.seed, which, row, head, queries % size, keys % size
        )

"""Layers that look at a few tokens before each one in code of their own, over shared rows and packed documents.

What: some convolutions are no call of a function that could be replaced: their taps are computed a token, or several
of them follow each other with a shift. All that is known of such a layer is its reach: the output of a token depends
on that many tokens before it, and the layer itself puts zeros in front of a row.

How: the layer runs on the last tokens of the ranks before and mine, and the outputs of the former are dropped. The
first tokens of each document are then computed again as rows of their own, all of them in one call.

Price a layer: one all-gather of `B x reach x width` numbers a rank, its reduce-scatter in the backward; the layer
runs on `reach` tokens more a row and document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...attention.implicit_positions import packs_documents
from ...parallel.gathered import gather_shares, joined
from .pieces import SharePieces


# By the end of a class's name: how many tokens before its own a token's output depends on.
WINDOWS: dict[str, Callable[[Any], int]] = {
    "CCAProjection": lambda module: max(module.conv_kernel_size, 1),  # the values are those of the token before
    "DynamicShortConvolution": lambda module: module.conv_kernel_size - 1,
}


def reach_of(module: torch.nn.Module) -> int | None:
    """The reach of a layer of [`WINDOWS`], `None` for every other module."""
    theirs = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.models.")]
    return next((reach(module) for end, reach in WINDOWS.items() if any(name.endswith(end) for name in theirs)), None)


def run_window(
    run: Callable, pieces: SharePieces, reach: int, tokens: Mapping[str, torch.Tensor | None], mask_name: str
) -> Any:
    """A layer with a reach on a rank's tokens of whole rows.

    Args:
        run (`Callable`): the layer, from its inputs by name to a tensor `(B, t, ...)` or a tuple of them.
        pieces ([`SharePieces`]): where documents begin.
        reach (`int`): tokens before each one that it depends on.
        tokens (`Mapping`): its inputs of shape `(B, t, ...)`; only `hidden_states` may matter to later tokens.
        mask_name (`str`): which of them is the mask that the layer multiplies `hidden_states` with.

    Returns:
        what `run` does.

    Communication: one all-gather forward, one reduce-scatter backward, where ranks share the rows.
    Gradient: equal to the whole rows', restricted to my tokens.
    """
    if reach == 0:
        return run(**tokens)
    given = {name: tensor for name, tensor in tokens.items() if tensor is not None}
    hidden_states = given["hidden_states"]
    halo, tails = 0, None
    if pieces.is_shared:
        mask = given.get(mask_name)
        masked = hidden_states if mask is None else (hidden_states * mask[..., None]).to(hidden_states.dtype)
        before, tails = _gather_before(pieces, masked, reach)
        if pieces.shard.rank:  # the first rank's row begins as the layer thinks
            halo = reach
            given = {name: _in_front(tensor, halo, int(name == mask_name)) for name, tensor in given.items()}
            given["hidden_states"] = torch.cat([before, hidden_states], dim=1)
    outputs = run(**{**tokens, **given})
    places = _beginnings(pieces, reach, halo)
    is_tuple = isinstance(outputs, tuple)
    parts = outputs if is_tuple else (outputs,)
    if places is not None:
        again = run(**{**tokens, **{name: places.rows(tensor) for name, tensor in given.items()}})
        parts = tuple(places.put(part, other) for part, other in zip(parts, again if is_tuple else (again,)))
    parts = tuple(part[:, halo:] for part in parts)
    if tails is not None:
        parts = (joined(parts[0], tails), *parts[1:])
    return parts if is_tuple else parts[0]


def _gather_before(pieces: SharePieces, hidden_states: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `reach` tokens before mine, zeros before the row; and what was gathered for them."""
    shard, tokens = pieces.shard, hidden_states.shape[1]
    tails = gather_shares(hidden_states[:, tokens - min(tokens, reach) :], shard.group, shard.stopwatch)
    before = tails[: shard.rank].movedim(0, 1).flatten(1, 2)[:, -reach:]
    return _in_front(before, reach - before.shape[1], 0), tails


def _in_front(tensor: torch.Tensor, tokens: int, value: int) -> torch.Tensor:
    filling = tensor.new_full((1,), value).expand(len(tensor), tokens, *tensor.shape[2:])
    return torch.cat([filling, tensor], dim=1)


class _Beginnings:
    """The first tokens of documents, of which those in front of them must not know."""

    def __init__(self, index: torch.Tensor, is_token: torch.Tensor) -> None:
        self.index, self.is_token = index, is_token

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Each document's first tokens as a row, from a tensor `(B, t, ...)`; zeros behind a document's end."""
        rows = tensor.flatten(0, 1)[self.index]
        is_token = self.is_token.view(*self.is_token.shape, *[1] * (rows.dim() - 2))
        return torch.where(is_token, rows, rows.new_zeros(()))

    def put(self, outputs: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
        """The outputs `(B, t, ...)`, with those of these tokens replaced."""
        flat = outputs.flatten(0, 1).index_put((self.index[self.is_token],), again[self.is_token])
        return flat.view(outputs.shape)


def _beginnings(pieces: SharePieces, reach: int, halo: int) -> _Beginnings | None:
    """Those among a rank's tokens and the `halo` in front of them; read once a batch."""
    plans = pieces.shard.derived
    if ("window", reach) not in plans:
        plans["window", reach] = _find_beginnings(pieces, reach, halo)
    return plans["window", reach]


def _find_beginnings(pieces: SharePieces, reach: int, halo: int) -> _Beginnings | None:
    shard = pieces.shard
    start, tokens = shard.rank * shard.local_len, halo + shard.local_len
    if not packs_documents(shard) and (start == 0 or start >= halo):
        return None
    documents = torch.nn.functional.pad(pieces.documents.cpu(), (halo, 0), value=-2)
    mine = documents[:, start : start + tokens]  # of a row with `halo` in front of it
    before = documents[:, start - 1 : start] if start else mine[:, :1]
    begins = torch.cat([before, mine], dim=1).diff(dim=1) != 0
    rows, firsts = begins.nonzero(as_tuple=True)
    if not len(rows):
        return None
    steps = firsts[:, None] + torch.arange(reach)
    inside = steps < tokens
    steps = torch.where(inside, steps, firsts[:, None])
    is_token = inside & (mine[rows[:, None], steps] == mine[rows, firsts][:, None])
    index = torch.where(is_token, rows[:, None] * tokens + steps, 0)
    device = pieces.documents.device
    return _Beginnings(index.to(device), is_token.to(device))

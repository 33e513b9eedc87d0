"""Reading with a cache: tokens go in, memory of one size comes out, whatever was read before.

Tokens are read in pieces that end where chunks end. A piece runs through all that needs no fast weights, up to the
attention of the first suffix layer, with the last keys and values, then through the rest with the fast weights as they
are. When the token after a chunk is there, the chunk's step is due: its suffix runs once more with a gradient. Nothing
depends on how tokens were handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..parallel.shard import IGNORE_INDEX
from .chunked_rows import suffix_mask
from .fast_cache import LayerWindow, TTTCache
from .inner import Chunk, Step, Suffix
from .prime_blocks import run_suffix
from .run_again import plain_autocast


@dataclass(frozen=True)
class Reader:
    """What reading needs of a model.

    Args:
        prefix (`Callable`): `(input_ids, windows, begin) -> hidden states`: what needs no fast weights.
        rotary (`Callable`): `(hidden states, begin) -> (cos and sin, positions)`.
        suffix ([`Suffix`]).
        step ([`Step`]).
        window, chunk_tokens (`int`).
        ignored (`int`, *optional*): the token that nothing is learned from (`bos`).
    """

    prefix: Callable[..., torch.Tensor]
    rotary: Callable[..., tuple[Any, torch.Tensor]]
    suffix: Suffix
    step: Step
    window: int
    chunk_tokens: int
    ignored: int | None


@torch.no_grad()
def read_tokens(reader: Reader, cache: TTTCache, input_ids: torch.Tensor, learn: bool) -> Iterator[torch.Tensor]:
    """Read `(B, t)` more tokens into `cache`.

    Yields:
        `torch.Tensor` of shape `(B, n, D)`: hidden states after the final norm, a piece at a time.

    Raises:
        RuntimeError: a step is not finite, or `learn` after tokens that nothing was learned from.
    """
    validate_reading(cache, input_ids, learn)
    if not cache.fast:
        cache.fast = [weight.detach().clone() for weight in reader.suffix.primes.start(len(input_ids))]
        cache.pending_ids = input_ids.new_zeros(len(input_ids), reader.chunk_tokens)
    if not learn and not cache.is_frozen:  # the unfinished chunk stays unfinished
        cache.is_frozen, cache.pending.length = True, 0
        for window in cache.windows:
            window.keep(reader.window - 1)
    begin = 0
    while begin < input_ids.shape[1]:
        following = begin + reader.chunk_tokens
        if learn and cache.pending.length == 0 and following < input_ids.shape[1]:
            yield _read_chunk(reader, cache, input_ids[:, begin:following], input_ids[:, following])
            begin = following
            continue
        if learn and cache.pending.length == reader.chunk_tokens:
            _finish_chunk(reader, cache, input_ids[:, begin])
        room = reader.chunk_tokens - (cache.pending.length if learn else 0)
        piece = input_ids[:, begin : begin + room]
        begin += piece.shape[1]
        with plain_autocast(input_ids.device):
            hidden = _read_piece(reader, cache, piece, learn)
        yield hidden


def validate_reading(cache: TTTCache, input_ids: torch.Tensor, learn: bool) -> None:
    """Raise before anything is read into a cache that cannot take it."""
    if learn and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "reading takes gradient steps, and `torch.inference_mode()` forbids gradients for good: use "
            "`torch.no_grad()`, or pass `learn=False`."
        )
    if learn and cache.is_frozen:
        raise RuntimeError(
            f"the cache has read tokens with `{cache.frozen_by}`, so its unfinished chunk has a gap: pass "
            "`learn=False` to go on without learning, or ask questions of `memory.copy()`, and go on reading with the "
            "memory itself."
        )
    if cache.rows is not None and cache.rows != len(input_ids):
        raise ValueError(
            f"the cache holds {cache.rows} rows, but {len(input_ids)} are given: every row has its own memory; pass "
            f"`cache=memory.repeat({max(len(input_ids) // cache.rows, 1)})` for several continuations of each."
        )


def _read_piece(reader: Reader, cache: TTTCache, piece: torch.Tensor, learn: bool) -> torch.Tensor:
    outside, windows = _windows(reader, cache)
    entered = reader.prefix(piece, outside, cache.seen)
    attends = _attends(reader, entered, cache.seen)
    hidden = run_suffix(reader.suffix.layers, reader.suffix.primes, entered, attends, windows, cache.fast)
    for window in outside:
        window.keep(reader.window - 1)
    if learn:
        assert cache.pending_ids is not None
        cache.pending_ids[:, cache.pending.length : cache.pending.length + piece.shape[1]] = piece
        cache.pending.append(entered)
    else:
        for window in windows:
            window.keep(reader.window - 1)
    if cache.pending.data is None:
        cache.pending.data = entered.new_zeros(*entered.shape[:1], reader.chunk_tokens, entered.shape[2])
    cache.seen += piece.shape[1]
    return reader.suffix.norm(hidden)


def _windows(reader: Reader, cache: TTTCache) -> tuple[list[LayerWindow], list[LayerWindow]]:
    """Windows of the attention that needs no fast weights, the suffix's first among it, and of all other."""
    outside = len(cache.windows) - len(reader.suffix.layers) + 1
    return cache.windows[:outside], cache.windows[outside:]


def _attends(reader: Reader, entered: torch.Tensor, begin: int) -> dict[str, Any]:
    rotary, positions = reader.rotary(entered, begin)
    mask = suffix_mask(reader.suffix, entered, reader.window, begin)
    return {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}


def _read_chunk(reader: Reader, cache: TTTCache, ids: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """A whole chunk and its step at once, where the token after it is known: its suffix runs once."""
    outside, within = _windows(reader, cache)
    with plain_autocast(ids.device):
        entered = reader.prefix(ids, outside, cache.seen)
    for window in outside:
        window.keep(reader.window - 1)
    if cache.pending.data is None:
        cache.pending.data = entered.new_zeros(*entered.shape[:1], reader.chunk_tokens, entered.shape[2])
    before = [window.before(0) for window in within] if cache.seen else []
    cache.seen += reader.chunk_tokens
    hidden, carried = _take_step(reader, cache, ids, following, entered, before, returns_tokens=True)
    for window, pair in zip(within, zip(carried[::2], carried[1::2]), strict=True):
        window.fill(*pair)
    return hidden


def _finish_chunk(reader: Reader, cache: TTTCache, following: torch.Tensor) -> None:
    """The step of the chunk that is complete, now that the token after it is known."""
    assert cache.pending_ids is not None
    count = cache.pending.length
    _, within = _windows(reader, cache)
    before = [window.before(count) for window in within] if cache.seen > count else []
    _take_step(reader, cache, cache.pending_ids, following, cache.pending.last(count), before, returns_tokens=False)
    cache.pending.length = 0
    for window in within:
        window.keep(reader.window - 1)


def _take_step(
    reader: Reader,
    cache: TTTCache,
    ids: torch.Tensor,
    following: torch.Tensor,
    entered: torch.Tensor,
    before: list,
    returns_tokens: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Learn from the chunk that was read last: hidden states, and keys and values to carry on."""
    targets = torch.cat((ids[:, 1:], following[:, None]), 1)
    learned = torch.ones_like(targets, dtype=torch.bool) if reader.ignored is None else targets != reader.ignored
    attends = _attends(reader, entered, cache.seen - entered.shape[1])
    carried = [tensor for pair in before for tensor in pair]
    chunk = Chunk(reader.suffix, attends, targets, learned, None, True, reader.step, reader.window - 1, returns_tokens)
    with plain_autocast(entered.device):
        _, squares, hidden, _, *state = chunk(entered, *cache.fast, *carried)
    validate_squares(squares[None], cache.steps, len(cache.windows) - len(reader.suffix.layers))
    cache.fast = state[: len(cache.fast)]
    cache.steps += 1
    return hidden, state[len(cache.fast) :]


def validate_squares(squares: torch.Tensor, first_chunk: int, first_layer: int) -> None:
    """Raise `RuntimeError` for a gradient of an inner step that is not finite; `squares` is `(steps, layers, B)`."""
    place = first_bad_step(squares, first_chunk, first_layer)
    if place is not None:
        raise RuntimeError(
            f"the inner step is not finite at {place}: lower `inner_learning_rate`, or train the model with inner "
            "steps before it reads with them."
        )


def first_bad_step(squares: torch.Tensor, first_chunk: int, first_layer: int) -> str | None:
    """Where the first gradient of an inner step is not finite, in words."""
    bad = (~torch.isfinite(squares)).nonzero()
    if not len(bad):
        return None
    step, layer, row = bad[0].tolist()
    return f"layer {first_layer + layer}, chunk {first_chunk + step}, row {row}"


def next_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, ignored: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token read next, `(B, T)` with -100 at the end, and which of them the inner loss learns from."""
    targets = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX)
    learned = targets != IGNORE_INDEX
    if attention_mask is not None:
        learned = learned & (torch.nn.functional.pad(attention_mask[:, 1:], (0, 1)) != 0)
    return targets, learned if ignored is None else learned & (targets != ignored)

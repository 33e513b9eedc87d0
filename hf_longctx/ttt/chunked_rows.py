"""Whole rows: the suffix chunk by chunk, with the weights that earlier chunks left.

What needs no fast weights has run over the whole row before: all up to the attention of the first suffix layer.
What a chunk passes on: the fast weights, and the last `window - 1` keys and values of the suffix layers after the
first, after their rotation, as they were computed. A last chunk may be shorter; no step follows it, as nothing reads
its weights.
With recomputation, forward keeps what goes into a chunk. Two levels keep that for groups of about `sqrt(n)` chunks.
Memory: one level, a copy of the fast weights and of the window a chunk; two levels, about `2 sqrt(n)` copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..parallel.shard import IGNORE_INDEX
from .inner import Chunk, Step, Suffix, row_means, token_losses
from .prime import Fast
from .prime_blocks import Carried, run_suffix
from .run_again import plain_autocast, run_again_in_backward
from .window_masks import window_mask


ONE_LEVEL_CHUNKS = 8


@dataclass(frozen=True)
class Tokens:
    """What the suffix knows of each token, all `(B, T)`.

    Args:
        targets: the token read next, -100 at the end of a row.
        learned: which of them the inner loss learns from.
        labels (*optional*): targets of the outer loss, -100 where none.
    """

    targets: torch.Tensor
    learned: torch.Tensor
    labels: torch.Tensor | None = None

    def labels_agree(self) -> bool:
        """Whether every label that counts is the token read next, so that one cross entropy serves both losses."""
        if self.labels is None:
            return True
        return bool(((self.labels == IGNORE_INDEX) | (self.labels == self.targets)).all())


@dataclass(frozen=True)
class RowPlan:
    """How rows are run.

    Args:
        chunk_tokens, window (`int`).
        step ([`Step`], *optional*): `None` to learn nothing.
        levels (`int`): of recomputation: 0, 1 or 2.
        returns_tokens (`bool`): whether hidden states and logits are returned.
        measures_gain (`bool`): whether each step is measured on the chunk after it, which costs a forward a chunk.
    """

    chunk_tokens: int
    window: int
    step: Step | None
    levels: int = 0
    returns_tokens: bool = True
    measures_gain: bool = False


@dataclass
class RowsOutput:
    """What rows gave: the sum of the outer losses, hidden states and logits, and what the steps were."""

    loss: torch.Tensor
    hidden_states: torch.Tensor
    logits: torch.Tensor
    squares: torch.Tensor  # (steps, layers, B): squared norms of the inner gradient
    gains: list[torch.Tensor] = field(default_factory=list)  # what a loss would be without the step, minus it


def recomputation_levels(chunks: int) -> int:
    """One level for a few chunks; two where a copy of the fast weights a chunk would add up."""
    return 1 if chunks <= ONE_LEVEL_CHUNKS else 2


def run_rows(
    suffix: Suffix, hidden_states: torch.Tensor, rotary: Any, positions: torch.Tensor, tokens: Tokens, plan: RowPlan
) -> RowsOutput:
    """The suffix over whole rows `(B, T, D)` of what left the attention of its first layer."""
    rows, length, _ = hidden_states.shape
    agree = tokens.labels_agree()
    masks: dict[tuple[int, int], Any] = {}  # most chunks see the same
    chunks = [
        _chunk(suffix, hidden_states, rotary, positions, tokens, plan, agree, begin, masks)
        for begin in range(0, length, plan.chunk_tokens)
    ]
    state, run = [*suffix.primes.start(rows)], _runner(suffix, plan)
    found, gains, older = [], [], state
    with plain_autocast(hidden_states.device):
        for members, begin in _groups(chunks, plan):
            end = min(begin + len(members) * plan.chunk_tokens, length)
            before = state
            outputs = run(members, hidden_states[:, begin:end], state)
            state = list(outputs[4:])
            found.append(outputs[:4])
            if plan.measures_gain and plan.step is not None and begin:
                gains.append(_gain(members[0], hidden_states[:, begin:end], older, before))
            older = before
    losses, squares, hidden, logits = zip(*found)
    shown = (torch.cat(hidden, 1), torch.cat(logits, 1)) if plan.returns_tokens else (hidden[0], logits[0])
    return RowsOutput(torch.stack(losses).sum(), *shown, torch.cat(squares), gains)


def _groups(chunks: list[Chunk], plan: RowPlan) -> list[tuple[list[Chunk], int]]:
    """Chunks that one body runs, and the token that the first of them begins with."""
    size = math.ceil(math.sqrt(len(chunks))) if plan.levels == 2 else 1
    return [(chunks[i : i + size], i * plan.chunk_tokens) for i in range(0, len(chunks), size)]


def _runner(suffix: Suffix, plan: RowPlan) -> Callable:
    parameters = suffix.parameters() if plan.levels else []

    def run_chunk(chunk: Chunk, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not plan.levels:
            return chunk(*tensors)
        return run_again_in_backward(chunk, tensors, parameters)

    def run(members: list[Chunk], hidden_states: torch.Tensor, state: Fast) -> tuple[torch.Tensor, ...]:
        def body(hidden: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return _run_members(run_chunk, members, plan, hidden, list(state))

        if plan.levels == 2 and len(members) > 1:
            return run_again_in_backward(body, (hidden_states, *state), parameters)
        return body(hidden_states, *state)

    return run


def _run_members(
    run_chunk: Callable, members: list[Chunk], plan: RowPlan, hidden_states: torch.Tensor, state: Fast
) -> tuple[torch.Tensor, ...]:
    """Chunks one after another: outer loss, squared norms a step, hidden states, logits, and what they leave."""
    losses, squares, hidden, logits = [], [], [], []
    for chunk, part in zip(members, hidden_states.split(plan.chunk_tokens, 1), strict=True):
        loss, square, shown, scores, *state = run_chunk(chunk, part, *state)
        losses.append(loss)
        squares.append(square)
        hidden.append(shown)
        logits.append(scores)
    steps = [square for chunk, square in zip(members, squares) if chunk.step is not None]
    square = torch.stack(steps) if steps else squares[0].new_zeros(0, *squares[0].shape)
    shown, scores = (torch.cat(hidden, 1), torch.cat(logits, 1)) if plan.returns_tokens else (hidden[0], logits[0])
    return torch.stack(losses).sum(), square, shown, scores, *state


def _chunk(
    suffix: Suffix,
    hidden_states: torch.Tensor,
    rotary: Any,
    positions: torch.Tensor,
    tokens: Tokens,
    plan: RowPlan,
    agree: bool,
    begin: int,
    masks: dict[tuple[int, int], Any],
) -> Chunk:
    part = hidden_states[:, begin : begin + plan.chunk_tokens]
    here = slice(begin, begin + part.shape[1])
    is_last = begin + part.shape[1] == hidden_states.shape[1]
    key = min(begin, plan.window - 1), part.shape[1]
    if key not in masks:
        masks[key] = suffix_mask(suffix, part, plan.window, begin)
    rotary = tuple(table[:, here] for table in rotary)
    return Chunk(
        suffix,
        {"attention_mask": masks[key], "position_ids": positions[:, here], "position_embeddings": rotary},
        tokens.targets[:, here],
        tokens.learned[:, here],
        None if tokens.labels is None else tokens.labels[:, here],
        agree,
        None if is_last else plan.step,
        plan.window - 1,
        plan.returns_tokens,
    )


def suffix_mask(suffix: Suffix, part: torch.Tensor, window: int, begin: int) -> Any:
    """The mask of the suffix for tokens that come after `begin` others; none where no attention is left in it."""
    if len(suffix.layers) == 1:
        return None
    config = suffix.layers[1].self_attn.config
    return window_mask(config._attn_implementation, config, part, window, min(begin, window - 1), skip=False)


@torch.no_grad()
def _gain(chunk: Chunk, hidden_states: torch.Tensor, older: Fast, state: Fast) -> torch.Tensor:
    """How much lower the inner loss of a chunk is for the step before it, a row.

    Both forwards draw the same dropout, from a copy of the generators: a step that is measured is the step that it
    would be, and the gain is of the weights alone.
    """
    count, losses = 3 * len(chunk.suffix.layers), []
    carried = [tensor.detach() for tensor in state[count:]]
    kind = hidden_states.device.type
    devices = [hidden_states.device] if kind != "cpu" else []
    for fast in (older[:count], state[:count]):
        keys = [Carried(pair) for pair in zip(carried[::2], carried[1::2])]
        with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
            hidden = run_suffix(chunk.suffix.layers, chunk.suffix.primes, hidden_states, chunk.attends, keys, fast)
            logits = chunk.suffix.head(chunk.suffix.norm(hidden))
        losses.append(row_means(token_losses(logits, chunk.targets), chunk.learned))
    return losses[0] - losses[1]

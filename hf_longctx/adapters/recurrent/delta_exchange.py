"""What ranks exchange for a delta rule, states or heads: what each sends, and which is chosen.

States do not grow with the row, heads do: short rows trade heads and long ones pass states. The sizes are the same on
all ranks of a row, so all of them choose alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...attention.explain import LayerPlan
from ...parallel.heads import split_heads
from .pieces import SharePieces


HEADS, STATES = "heads", "states"
_WORDS = {HEADS: "trade tokens for heads", STATES: "hand states on"}


@dataclass(frozen=True)
class DeltaSizes:
    """Sizes of one call, the same on every rank of a row.

    Args:
        ranks (`int`): that share a row, `P`.
        rows (`int`), tokens (`int`): of this rank, `B` and `t`.
        key_heads (`int`), heads (`int`): of keys and queries, and of values.
        key_size (`int`), value_size (`int`), decay_size (`int`): numbers a head; 1 decay of the gated delta rule.
        value_bytes (`int`), decay_bytes (`int`), beta_bytes (`int`): of one number; keys have those of values.
    """

    ranks: int
    rows: int
    tokens: int
    key_heads: int
    heads: int
    key_size: int
    value_size: int
    decay_size: int
    value_bytes: int
    decay_bytes: int
    beta_bytes: int
    state_bytes: int = 4

    @classmethod
    def of(cls, ranks: int, query, key, value, g, beta) -> DeltaSizes:
        """From the inputs of the function."""
        rows, tokens, key_heads, key_size = key.shape
        numbers = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        decays = g.shape[-1] if g.dim() == 4 else 1
        sizes = (*value.shape[2:], decays, numbers.itemsize, g.dtype.itemsize, beta.dtype.itemsize)
        return cls(ranks, rows, tokens, key_heads, sizes[0], key_size, *sizes[1:])

    def of_one_row(self) -> tuple[int, int, int, int, int]:
        """What a kernel may have limits for."""
        return self.key_heads, self.heads, self.key_size, self.value_size, self.decay_size

    @property
    def can_trade(self) -> bool:
        """Whether every rank gets a head."""
        return self.ranks <= self.heads and self.heads % self.key_heads == 0

    def bytes_of(self, exchange: str) -> int:
        """What leaves a rank, forward and backward; of heads that cannot be shared evenly, the mean over ranks."""
        return 2 * (self._of_states() if exchange == STATES else self._of_heads())

    def _of_states(self) -> int:
        numbers = self.rows * self.heads * self.key_size * (self.key_size + self.value_size)
        return (self.ranks - 1) * numbers * self.state_bytes

    def _of_heads(self) -> int:
        split = split_heads(self.heads, self.key_heads, self.ranks)
        here = self.value_bytes * self.value_size  # a token's output
        value = here + self.decay_bytes * self.decay_size + self.beta_bytes
        pair = 2 * self.value_bytes * self.key_size
        sent = 0
        for rank in range(self.ranks):
            for peer in range(self.ranks):
                if peer != rank:
                    sent += value * split.query_count(peer) + pair * split.key_value_count(peer)
                    sent += here * split.query_count(rank)
        return self.rows * self.tokens * sent // self.ranks


def choose_exchange(sizes: DeltaSizes, hands_on: bool, wanted: str | None, name: str) -> str:
    """Heads or states.

    Args:
        sizes ([`DeltaSizes`]): of the call.
        hands_on (`bool`): the final state of the function has a gradient, or none is needed.
        wanted (`str`, *optional*): unset, what sends less.
        name (`str`): of the function, for messages.

    Raises:
        ValueError: trading is wanted with more ranks than heads.
        NotImplementedError: states must be passed, and the final state has no gradient.
    """
    if wanted == HEADS and not sizes.can_trade:
        raise ValueError(
            f"`exchange` ('heads') shares the {sizes.heads} heads of `{name}` among {sizes.ranks} ranks, and every "
            f"rank needs one: leave it unset, or set `sequence_parallel_size` to {sizes.heads} or less."
        )
    if wanted == STATES or not sizes.can_trade:
        if not hands_on:
            raise NotImplementedError(
                f"the final state of `{name}` has no gradient, so ranks would not learn from the tokens that others "
                f"read: set `sequence_parallel_size` to {sizes.heads} or less, which trades heads instead, or use "
                "another kernel."
            )
        return STATES
    if wanted == HEADS or not hands_on:
        return HEADS
    return STATES if sizes.bytes_of(STATES) < sizes.bytes_of(HEADS) else HEADS


@lru_cache(maxsize=64)
def state_has_gradient(
    function: Callable, key_heads: int, heads: int, keys: int, values: int, decays: int, dtype, device
) -> bool:
    """Whether the final state of a delta rule has a gradient, found by one backward of two tokens.

    Args:
        function (`Callable`): transformers' function, or a kernel's.
        key_heads (`int`), heads (`int`), keys (`int`), values (`int`), decays (`int`): sizes; see [`DeltaSizes`].
        dtype (`torch.dtype`), device (`torch.device`): of the run.
    """
    fill = lambda *shape, number=1.0: torch.full((1, 2, *shape), number, dtype=dtype, device=device)
    gradient_of = fill(heads, values).requires_grad_()
    decay = fill(heads, decays, number=-0.1).float() if decays > 1 else fill(heads, number=-0.1).float()
    arguments = (fill(key_heads, keys), fill(key_heads, keys), gradient_of)
    start = torch.zeros(1, heads, keys, values, device=device)
    # A layer that is checkpointed counts what its forward saves, and this call is not run again.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        _, state = function(
            *arguments,
            g=decay,
            beta=fill(heads, number=0.5),
            initial_state=start,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        if not state.requires_grad:
            return False
        try:
            (gradient,) = torch.autograd.grad(state.sum(), [gradient_of], allow_unused=True)
        except (NotImplementedError, AssertionError, RuntimeError):
            return False
    return gradient is not None and bool(gradient.any())


def plan_of(pieces: SharePieces, name: str, sizes: DeltaSizes, exchange: str) -> LayerPlan:
    """What these layers do, in words, for `explain_attention`."""
    other = HEADS if exchange == STATES else STATES
    method = f"ranks {_WORDS[exchange]}, {sizes.bytes_of(exchange):,} bytes a rank, forward and backward"
    if other == STATES or sizes.can_trade:
        method += f" ({other}: {sizes.bytes_of(other):,})"
    return LayerPlan(name, "recurrent", pieces.in_words(), method, 0)

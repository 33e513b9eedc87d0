"""Pooling as a loop over spans, and spans of every kind in a row of eleven tokens."""

from __future__ import annotations

import torch

from hf_longctx.parallel.pooling import POOLING_MODES, Spans


TOKENS = 11
# Start, end and origin of each span.
LAYOUTS = {
    "documents": [(0, 4, 0), (4, 5, 4), (5, 11, 5)],
    "after a prompt": [(2, 4, 0), (5, 5, 4), (7, 11, 5)],
    "one document": [(0, 11, 0)],
    "tokens": [(i, i + 1, i) for i in range(11)],
    "empty ones": [(0, 0, 0), (0, 6, 0), (6, 6, 6), (6, 11, 6), (11, 11, 10)],
    "messages of a document": [(1, 3, 1), (3, 4, 3), (6, 10, 6)],
    "overlapping": [(0, 7, 0), (3, 9, 3), (3, 9, 0)],
    "in no order": [(8, 11, 8), (0, 3, 0), (3, 8, 3)],
    "none": [],
}


def spans_of(layout: str) -> Spans:
    return Spans(*torch.tensor(LAYOUTS[layout], dtype=torch.long).reshape(-1, 3).unbind(1))


def modes_of(layout: str) -> tuple[str, ...]:
    """An empty span at the start of a row has no last token."""
    has_last = all(end > 0 for _, end, _ in LAYOUTS[layout])
    return tuple(mode for mode in POOLING_MODES if mode != "lasttoken" or has_last)


def random_hidden(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Hidden states of which many are equal, so that maxima are shared by tokens everywhere in a span."""
    numbers = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(width))
    return ((numbers * 2).round() / 2).to(dtype)


def pool_by_loop(hidden: torch.Tensor, spans: Spans, mode: str) -> torch.Tensor:
    """`(n, D)` by the definition of `mode`, one span at a time."""
    vectors = []
    for start, end, origin in zip(spans.starts.tolist(), spans.ends.tolist(), spans.origins.tolist()):
        tokens = hidden[start:end]
        if mode == "cls":
            vectors.append(hidden[start if start < end else origin])
        elif mode == "lasttoken":
            vectors.append(hidden[end - 1])
        elif start == end:
            vectors.append(torch.full_like(hidden[0], -torch.inf if mode == "max" else 0))
        elif mode == "max":
            vectors.append(tokens.amax(0))  # tokens that share a maximum share its gradient evenly
        elif mode == "weightedmean":
            weights = torch.arange(start - origin + 1, end - origin + 1, dtype=hidden.dtype)[:, None]
            vectors.append((tokens * weights).sum(0) / weights.sum())
        else:
            vectors.append(tokens.sum(0) / (end - start) ** {"mean": 1, "mean_sqrt_len_tokens": 0.5}[mode])
    return torch.stack(vectors) if vectors else hidden[:0]


def random_upstream(vectors: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Random gradients of these vectors, zero where there is no finite number."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=generator).to(v.dtype).where(v.isfinite(), 0) for v in vectors]


def gradient(vectors: list[torch.Tensor], upstream: list[torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """That of `hidden`."""
    return torch.autograd.grad(vectors, hidden, upstream)[0]

"""Late chunking: embed a whole document once, then pool given spans of it.

Every span's vector has seen the whole document. Spans are marked token by token (`span_ids`), so they travel, are cut
and are sliced with the tokens: gradient caching and sharding need nothing special.

Source: Late Chunking, https://huggingface.co/papers/2409.04701.
"""

from __future__ import annotations

import torch

from ..parallel.pooling import Spans


NO_SPAN = -1


def spans_of_rows(span_ids: torch.Tensor, bounds: torch.Tensor) -> Spans:
    """The runs of equal numbers in `span_ids` `(T,)` that do not cross a document of `cu_seq_lens` `(n + 1,)`."""
    breaks = torch.ones(len(span_ids) + 1, dtype=torch.bool, device=span_ids.device)
    breaks[1:-1] = span_ids[1:] != span_ids[:-1]
    breaks[bounds.long()] = True
    edges = breaks.nonzero().flatten()
    starts, ends = edges[:-1], edges[1:]
    kept = span_ids[starts] != NO_SPAN
    return Spans(starts[kept], ends[kept], starts[kept])

"""The reference implementation: attention over whole rows, one query at a time, as defined. Slow on purpose.

Every registered name is compared with it. It shares no code with the kernels, the masks or the all-to-all.
"""

from __future__ import annotations

import math

import torch


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    window: int | None = None,
    chunk: int | None = None,
    segments: list[list[int]] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by definition, with python loops over rows, heads and queries.

    Args:
        query (`torch.Tensor` of shape `(B, N, T, H)`): whole rows, all heads.
        key, value (`torch.Tensor` of shape `(B, K, T, H)` and `(B, K, T, H_v)`): query head `h` reads head `h //
            (N / K)`.
        causal, window, chunk: as in [`AttentionRule`]; chunks count from the start of the document.
        segments (`list[list[int]]`, *optional*): document of every token, -1 for padding, which sees no token and is
            seen by none.
        scaling, softcap, sinks: as in the kernels; `sinks` has shape `(N,)`.

    Returns:
        `torch.Tensor` of shape `(B, T, N, H_v)`; zeros where a token sees nothing.
    """
    rows, heads, num_tokens, head_size = query.shape
    scaling = 1 / math.sqrt(head_size) if scaling is None else scaling
    output = query.new_zeros(rows, num_tokens, heads, value.shape[-1])
    for row in range(rows):
        documents = segments[row] if segments is not None else [0] * num_tokens
        for head in range(heads):
            shared = head // (heads // key.shape[1])
            for i in range(num_tokens):
                seen = [j for j in range(num_tokens) if _sees(i, j, documents, causal, window, chunk)]
                if not seen:
                    continue
                scores = torch.stack([(query[row, head, i] * key[row, shared, j]).sum() * scaling for j in seen])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head].reshape(1).to(scores)])
                weights = torch.softmax(scores, dim=0)[: len(seen)]
                values = torch.stack([value[row, shared, j] for j in seen])
                output[row, i, head] = (weights[:, None] * values).sum(dim=0)
    return output


def _sees(i: int, j: int, documents: list[int], causal: bool, window: int | None, chunk: int | None) -> bool:
    if documents[i] != documents[j] or documents[i] < 0:
        return False
    if causal and j > i:
        return False
    if window is not None and (i - j >= window if causal else abs(i - j) > window):
        return False
    if chunk is not None:
        start = documents.index(documents[i])
        return (i - start) // chunk == (j - start) // chunk
    return True

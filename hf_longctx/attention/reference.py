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


def reference_lsh(
    query: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    *,
    window: int,
    layout: str = "causal",
    causal: bool = True,
    segments: list[list[int]] | None = None,
    scaling: float,
) -> torch.Tensor:
    """LSH attention by definition: softmax of a score plus the logarithm of how often rounds show the pair.

    Args:
        query (`torch.Tensor` of shape `(B, N, T, H)`): shared queries and keys; a key is divided by its length.
        value (`torch.Tensor` of shape `(B, N, T, H_v)`).
        buckets (`torch.Tensor` of shape `(R, B, N, T)`): of every token in every round.
        window, layout, causal, segments, scaling: as in [`lsh_attention`][hf_longctx.attention.lsh.lsh_attention].

    Returns:
        `torch.Tensor` of shape `(B, T, N, H_v)`; zeros for padding.
    """
    rows, heads, num_tokens, head_size = query.shape
    output = query.new_zeros(rows, num_tokens, heads, value.shape[-1])
    for row in range(rows):
        documents = segments[row] if segments is not None else [0] * num_tokens
        for head in range(heads):
            vectors = query[row, head]
            lengths = (vectors.square().mean(-1, keepdim=True) + 1e-6).sqrt() * math.sqrt(head_size)
            for document in sorted(set(documents) - {-1}):
                tokens = [i for i in range(num_tokens) if documents[i] == document]
                rounds = [[int(each[row, head, i]) for i in tokens] for each in buckets]
                shows = _shown_in_window if layout == "causal" else _shown_in_chunks
                counts = shows(rounds, window, causal)
                for place, i in enumerate(tokens):
                    seen = [j for j in range(len(tokens)) if counts[place][j]]
                    scores = [vectors[i] @ (vectors / lengths)[tokens[j]] * scaling for j in seen]
                    scores = [s if j != place else s.new_tensor(-1e5) for s, j in zip(scores, seen)]
                    scores = [s + math.log(counts[place][j]) for s, j in zip(scores, seen)]
                    weights = torch.softmax(torch.stack(scores), dim=0)
                    values = torch.stack([value[row, head, tokens[j]] for j in seen])
                    output[row, i, head] = (weights[:, None] * values).sum(dim=0)
    return output


def _shown_in_window(rounds: list[list[int]], window: int, causal: bool) -> list[list[int]]:
    size = len(rounds[0])
    counts = [[0] * size for _ in range(size)]
    for each in rounds:
        for i in range(size):
            before = [j for j in range(i) if each[j] == each[i]]
            after = [j for j in range(i + 1, size) if each[j] == each[i]]
            near = before[len(before) - min(window - 1, len(before)) :]
            for j in [*near, i, *([] if causal else after[: window - 1])]:
                counts[i][j] += 1
    return counts


def _shown_in_chunks(rounds: list[list[int]], window: int, causal: bool) -> list[list[int]]:
    size = len(rounds[0])
    counts = [[0] * size for _ in range(size)]
    circle = []
    for each in rounds:
        order = sorted(range(size), key=lambda i: (each[i], i))
        circle += [order[start : start + window] for start in range(0, size, window)]
    for index, chunk in enumerate(circle):
        behind = [] if size <= window else circle[index - 1]
        for i in chunk:
            for j in [*behind, *chunk]:
                if j <= i or not causal:
                    counts[i][j] += 1
    return counts

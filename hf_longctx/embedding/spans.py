"""Late chunking: embed a whole document once, then pool given spans of it.

Every span's vector has seen the whole document. Spans are marked token by token (`span_ids`), so they travel, are cut
and are sliced with the tokens: gradient caching and sharding need nothing special.

Source: Late Chunking, https://huggingface.co/papers/2409.04701.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..parallel.pooling import Spans


NO_SPAN = -1
SPANS_SUFFIX = "_spans"
WITH_OFFSETS = {"text": {"return_offsets_mapping": True}}


def spans_of_rows(span_ids: torch.Tensor, bounds: torch.Tensor) -> Spans:
    """The runs of equal numbers in `span_ids` `(T,)` that do not cross a document of `cu_seq_lens` `(n + 1,)`."""
    breaks = torch.ones(len(span_ids) + 1, dtype=torch.bool, device=span_ids.device)
    breaks[1:-1] = span_ids[1:] != span_ids[:-1]
    breaks[bounds.long()] = True
    edges = breaks.nonzero().flatten()
    starts, ends = edges[:-1], edges[1:]
    kept = span_ids[starts] != NO_SPAN
    return Spans(starts[kept], ends[kept], starts[kept])


def mark_spans(
    features: Mapping[str, Any],
    documents: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    prompt: str | None = None,
) -> torch.Tensor:
    """The span of every token of a flat row of documents.

    Args:
        features (`Mapping`): what a packed model's `preprocess` made of the documents under `WITH_OFFSETS`.
        documents (`Sequence[str]`): the texts.
        spans (`Sequence`): for each document its `(start, end)` pairs of characters, in order, without overlap.
        prompt (`str`, *optional*): what stands in front of each document.

    Returns:
        `torch.Tensor` of shape `(1, T)`: the number of the token's span within its document, -1 for none. A token
        belongs to the span in which its first character that is no white space lies: many tokenizers count the space
        before a word to the word.

    Raises:
        ValueError: spans that overlap, are empty, or have no token because the document was cut off before them.
        NotImplementedError: the model pads, rewrites its texts by a chat template, or has a tokenizer without offsets.
    """
    if features.get("modality") != "text" or "cu_seq_lens_q" not in features or "offset_mapping" not in features:
        raise NotImplementedError(
            "spans need a packed model with a fast tokenizer and no chat template, so that characters can be traced "
            "to tokens: call `hf_longctx.pack_embeddings(model)`, or leave spans out."
        )
    bounds, shift = features["cu_seq_lens_q"].tolist(), len(prompt or "")
    marks = torch.full((bounds[-1],), NO_SPAN)
    for document, (start, end) in enumerate(zip(bounds, bounds[1:])):
        offsets = features["offset_mapping"][start:end]
        if not bool((offsets[:, 1] > offsets[:, 0]).any()):
            raise NotImplementedError(
                f"the tokenizer gives empty offsets for all {end - start} tokens of document {document}, so "
                "characters cannot be traced to tokens: use a fast tokenizer with offsets, or leave spans out."
            )
        offsets = _without_leading_space(offsets, (prompt or "") + documents[document]) - shift
        _mark_document(marks[start:end], offsets, spans[document], document, len(documents[document]))
    return marks[None]


def _without_leading_space(offsets: torch.Tensor, text: str) -> torch.Tensor:
    """Offsets `(T, 2)` that begin at the first character that is no white space, where a token has one."""
    # From each character to the next that is no white space, itself included.
    index = torch.arange(len(text) + 1)
    index[:-1][torch.tensor([character.isspace() for character in text], dtype=torch.bool)] = len(text)
    following = index.flip(0).cummin(0).values.flip(0).to(offsets.device)
    first, last = offsets.unbind(1)
    moved = following[first.clamp(max=len(text))]
    return torch.stack([torch.where(moved < last, moved, first), last], dim=1)


def _mark_document(marks: torch.Tensor, offsets: torch.Tensor, spans, document: int, num_characters: int) -> None:
    first, last = offsets.unbind(1)
    real = last > first
    before = 0
    for number, (start, end) in enumerate(spans):
        where = f"span {number} [{start}, {end}) of document {document} ({num_characters} characters)"
        if not before <= start < end <= num_characters:
            raise ValueError(
                f"{where} must lie inside the document and behind the span before it (which ends at {before}): sort "
                "spans, and cut where they overlap."
            )
        inside = real & (first >= start) & (first < end)
        if not bool(inside.any()):
            kept = int(last.max()) if len(last) else 0
            raise ValueError(
                f"{where} has no token: the tokenizer keeps {kept} characters; raise `model.max_seq_length`, or leave "
                "such spans out."
            )
        marks[inside] = number
        before = end
    if len(spans) == 0:
        raise ValueError(f"document {document} has no span: give it at least one, such as all of it.")


def encode_spans(
    model,
    documents: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    *,
    prompt: str | None = None,
    batch_size: int = 8,
) -> list[torch.Tensor]:
    """Embed each document once and return a vector for each of its spans.

    Args:
        model (`SentenceTransformer`): packed by [`pack_embeddings`].
        documents (`Sequence[str]`): whole texts.
        spans (`Sequence`): for each document its `(start, end)` pairs of characters, in order, without overlap.
        prompt (`str`, *optional*): put in front of each document; never part of a span.
        batch_size (`int`, *optional*, defaults to 8): documents in one row.

    Returns:
        `list[torch.Tensor]` of shape `(spans of the document, D)`, with everything that follows pooling in the model.

    Raises:
        ValueError: see [`mark_spans`], or lists of different length.

    Communication: that of the model's forward; a group that shares rows must call it together.
    """
    if len(documents) != len(spans):
        raise ValueError(
            f"there are {len(documents)} documents but `spans` of {len(spans)}: give each document a list."
        )
    vectors = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for begin in range(0, len(documents), batch_size):
                some, theirs = documents[begin : begin + batch_size], spans[begin : begin + batch_size]
                features = model.preprocess(list(some), prompt=prompt, processing_kwargs=WITH_OFFSETS)
                features["span_ids"] = mark_spans(features, some, theirs, prompt)
                features = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
                vectors.extend(model(features)["sentence_embedding"].split([len(each) for each in theirs]))
    finally:
        model.train(was_training)
    return vectors

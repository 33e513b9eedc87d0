"""sentence-transformers' collator, with empty texts refused and spans of documents marked token by token."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from .spans import SPANS_SUFFIX, WITH_OFFSETS, mark_spans


@dataclass
class EmbeddingCollator(SentenceTransformerDataCollator):
    """Rows of texts to the features of each column.

    A column `document_spans` next to a text column `document` holds `[start, end]` pairs of characters; the document
    is then embedded once, and each span gets a vector of its own.

    Raises on a call:
        ValueError: an empty text, or spans that overlap, are empty or lie behind what the tokenizer keeps.
    """

    def __call__(self, features: list[dict]) -> dict:
        refuse_empty_texts(features)
        columns = [name for name in features[0] if name.endswith(SPANS_SUFFIX)] if features else []
        columns = [name for name in columns if name.removesuffix(SPANS_SUFFIX) in features[0]]
        if not columns:
            return super().__call__(features)
        with_offsets = copy.copy(self)
        with_offsets.preprocess_fn = partial(self.preprocess_fn, processing_kwargs=WITH_OFFSETS)
        texts = [{key: row[key] for key in row if key not in columns} for row in features]
        batch = super(EmbeddingCollator, with_offsets).__call__(texts)
        prompts = self._resolve_prompts(batch)
        for name in columns:
            prefix = name.removesuffix(SPANS_SUFFIX) + "_"
            column = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
            documents, spans = [row[prefix[:-1]] for row in features], [row[name] for row in features]
            prompt = self._get_prompt_for_column(prompts, prefix[:-1])
            batch[f"{prefix}span_ids"] = mark_spans(column, documents, spans, prompt)
        return {key: value for key, value in batch.items() if not key.endswith("_offset_mapping")}


def refuse_empty_texts(rows: list[dict]) -> None:
    """Raise `ValueError` if a row has no text, or one of nothing but white space: its embedding would mean nothing."""
    for index, row in enumerate(rows):
        for column, value in row.items():
            if value is None or (isinstance(value, float) and value != value):
                raise ValueError(
                    f"column `{column}` in row {index} of a batch of {len(rows)} is {value}: remove such rows, for "
                    f"example with `dataset.filter(lambda row: row[{column!r}] is not None)`."
                )
            if isinstance(value, str) and column != "dataset_name" and not value.strip():
                neighbor = next((text for text in row.values() if isinstance(text, str) and text.strip()), "")
                raise ValueError(
                    f"the text of column `{column}` in row {index} of a batch of {len(rows)} is empty (next to it: "
                    f"{neighbor[:60]!r}): remove such rows, for example with `dataset.filter(lambda row: "
                    f"row[{column!r}].strip())`."
                )

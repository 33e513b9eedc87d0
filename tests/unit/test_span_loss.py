"""`SpanRankingLoss` equals a cross entropy over spans that are cut by hand out of the padded model's tokens."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F


pytest.importorskip("sentence_transformers")

from hf_longctx import SpanRankingLoss, pack_embeddings
from hf_longctx.embedding.text_collator import EmbeddingCollator

from ..embedding import embedder, gradients_of, texts
from .test_embedding import DOCS, SPANS, TOLERANCE, WORDS, assert_same_gradients


ROWS = [
    {"query": query, "document": document, "document_spans": spans, "label": label}
    for query, document, spans, label in zip(texts((4, 9, 2), 300), DOCS, SPANS, (1, 0, 2))
]


def by_hand(name: str):
    model = embedder(name, "sdpa").eval()
    queries = model(model.preprocess([row["query"] for row in ROWS]))["sentence_embedding"]
    tokens = model(model.preprocess(DOCS))["token_embeddings"]
    vectors = [tokens[i, first:last].mean(0) for i, words in enumerate(WORDS) for first, last in words]
    positives = torch.tensor([1, 2 + 0, 3 + 2])
    scores = 20 * F.normalize(queries) @ F.normalize(torch.stack(vectors)).T
    loss = F.cross_entropy(scores, positives)
    loss.backward()
    return loss.detach(), gradients_of(model)


def features_of(model):
    batch = EmbeddingCollator(preprocess_fn=model.preprocess)(ROWS)
    columns = ("query_", "document_")
    return [{k.removeprefix(c): v for k, v in batch.items() if k.startswith(c)} for c in columns], batch["label"]


@pytest.mark.parametrize("settings", [{"mini_batch_size": 2}, {"mini_batch_num_tokens": 25}, {"mini_batch_size": 99}])
@pytest.mark.parametrize("name", ["bert", "llama both ways"])
def test_span_loss_equals_spans_cut_by_hand(name, settings):
    expected_loss, expected = by_hand(name)
    model = pack_embeddings(embedder(name, "packed")).eval()
    loss = SpanRankingLoss(model, **settings)(*features_of(model))
    loss.backward()
    assert torch.allclose(loss.detach(), expected_loss, rtol=TOLERANCE)
    assert_same_gradients(expected, gradients_of(model))


def test_bad_batches_are_refused():
    model = pack_embeddings(embedder("bert", "packed"))
    loss, (features, labels) = SpanRankingLoss(model), features_of(model)
    with pytest.raises(ValueError, match=re.escape("got 1 column(s), of which 0 have spans: it needs a query and a")):
        loss(features[:1], labels)
    with pytest.raises(ValueError, match="got no labels: add a column `label` with the number of the span"):
        loss(features, None)
    with pytest.raises(ValueError, match=re.escape("`label` of row 1 is 1, but its document has 1 span(s), numbered")):
        loss(features, torch.tensor([0, 1, 0]))

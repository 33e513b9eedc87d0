"""Models with a `Router`: every route is proven, and packed like padded; modules that read rows are refused."""

from __future__ import annotations

import pytest
import torch


pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import CNN, LSTM, Pooling, StaticEmbedding, WordWeights

from hf_longctx import pack_embeddings

from ..embedding import embedder, gradients_of, texts
from .test_embedding import TOLERANCE, assert_same_gradients


def routed(attention: str, query: str = "bert", document: str = "roberta", pooling_after: bool = False, heads=False):
    """A query and a document model; pooled in their routes or behind the router, with a head for each behind that."""
    routes = {}
    for name, kind in (("query", query), ("document", document)):
        if kind == "static":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                static = StaticEmbedding(embedder("bert")[0].tokenizer.backend_tokenizer, embedding_dim=48).double()
            routes[name] = [static]
        else:
            routes[name] = list(embedder(kind, attention, "mean"))[: 1 if pooling_after else 2]
    modules = [Router(routes), *([Pooling(48, "mean")] if pooling_after else [])]
    if heads:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            modules.append(Router({name: [Dense(48, 16).double(), Dense(16, 8).double()] for name in routes}))
    return SentenceTransformer(modules=modules, device="cpu")


def step(model):
    model.eval()
    features = [
        model.preprocess(texts(lengths, 100 * index), task=task)
        for index, (task, lengths) in enumerate((("query", (5, 1, 9, 3)), ("document", (17, 4, 2, 30))))
    ]
    loss = losses.MultipleNegativesRankingLoss(model)(features, None)
    loss.backward()
    return loss.detach(), gradients_of(model)


CASES = {
    "two models": {},
    "static queries": {"query": "static"},
    "pooled behind": {"pooling_after": True},
    "heads behind": {"pooling_after": True, "heads": True},
}


@pytest.mark.parametrize("case", CASES)
def test_every_route_gives_the_padded_loss_and_gradients(case):
    expected_loss, expected = step(routed("sdpa", **CASES[case]))
    loss, actual = step(pack_embeddings(routed("packed", **CASES[case])))
    assert torch.allclose(loss, expected_loss, rtol=TOLERANCE)
    assert_same_gradients(expected, actual)


def leaking(model):
    own = type(model).forward

    def forward(**kwargs):
        output = own(model, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(dim=1, keepdim=True)
        return output

    model.forward = forward


@pytest.mark.parametrize("route", ["query", "document"])
@pytest.mark.parametrize("case", ["two models", "heads behind"])
def test_a_route_that_reads_across_texts_is_refused_by_name(case, route):
    model = routed("packed", **CASES[case])
    leaking(model[0].sub_modules[route][0].model)
    with pytest.raises(NotImplementedError, match=f"packed in one row on route '{route}.* otherwise than alone"):
        pack_embeddings(model)


READERS = {
    "CNN": lambda: CNN(48, 48, [3]),
    "LSTM": lambda: LSTM(48, 24),
    "WordWeights": lambda: WordWeights(["w1"], {"w1": 1.0}),
}


@pytest.mark.parametrize("name", READERS)
def test_modules_that_read_rows_of_tokens_are_refused_by_name(name):
    inner = list(embedder("bert", "packed"))
    plain = SentenceTransformer(modules=[inner[0], READERS[name]().double(), inner[1]], device="cpu")
    with pytest.raises(NotImplementedError, match=f"`{name}` reads texts side by side"):
        pack_embeddings(plain)
    routes = {"query": [inner[0], READERS[name]().double(), inner[1]], "document": list(embedder("bert", "packed"))}
    with pytest.raises(NotImplementedError, match=f"`{name}` in route 'query' reads texts side by side"):
        pack_embeddings(SentenceTransformer(modules=[Router(routes)], device="cpu"))

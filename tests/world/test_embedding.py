"""Sentence-transformers whose rows two and four ranks share equal one process: embeddings, loss, every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses

from hf_longctx import SequenceMesh
from hf_longctx.embedding.packed_model import pack_embeddings

from ..embedding import columns, embedder, gradients_of, texts
from ..unit.test_embedding import DOCUMENTS, MODES, QUERIES, TOLERANCE, assert_same_gradients, tolerance_of


LONG = (3, 70, 1, 20)  # the second document has a part on every rank


def loss_of(kind: str, model):
    if kind == "cached":
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    return losses.MultipleNegativesRankingLoss(model)


def one_process(name: str, mode, kind: str = "plain", lengths=(QUERIES, LONG)):
    model = embedder(name, "sdpa", mode).eval()
    loss = loss_of(kind, model)(columns(model, *lengths), None)
    loss.backward()
    return loss.detach(), gradients_of(model)


def shared(name: str, mode, kind: str, size: int, lengths=(QUERIES, LONG)):
    """Loss and averaged gradients of a model whose rows `size` ranks share, as DDP averages them."""
    mesh = SequenceMesh.build(size)
    model = pack_embeddings(embedder(name, "ulysses", mode), mesh).eval()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    features = columns(model, *lengths)
    loss_function = loss_of(kind, model)
    loss_function.model = wrapped  # as sentence-transformers' trainer does
    loss = loss_function(features, None)
    loss.backward()
    return loss.detach(), gradients_of(model)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("name", "mode"),
    [("bert", mode) for mode in MODES] + [("modernbert", "mean"), ("llama", "lasttoken"), ("embeddinggemma", "mean")],
)
def test_shared_rows_give_one_process_loss_and_gradients(worlds, name, mode, size):
    expected_loss, expected = one_process(name, mode)
    for loss, actual in worlds(size).run(shared, name, mode, "plain", size):
        assert torch.allclose(loss, expected_loss, rtol=tolerance_of(name))
        assert_same_gradients(expected, actual, tolerance_of(name))


@pytest.mark.parametrize("name", ["roberta", "llama both ways"])
def test_gradient_caching_under_shared_rows(world2, name):
    expected_loss, expected = one_process(name, ("mean", "max", "cls"), "cached")
    for loss, actual in world2.run(shared, name, ("mean", "max", "cls"), "cached", 2):
        assert torch.allclose(loss, expected_loss, rtol=TOLERANCE)
        assert_same_gradients(expected, actual)


def encode_shared(include_prompt: bool):
    mesh = SequenceMesh.build(2)
    settings = {"pooling": ("mean", "cls", "weightedmean"), "include_prompt": include_prompt}
    model = pack_embeddings(embedder("bert", "ulysses", **settings), mesh)
    inputs = texts((5, 1, 40, 12, 3))
    return [model.encode(inputs, prompt=prompt, batch_size=3, convert_to_tensor=True) for prompt in (None, "w1 w2 ")]


@pytest.mark.parametrize("include_prompt", [True, False])
def test_encoding_shared_rows_equals_the_padded_model(world2, include_prompt):
    settings = {"pooling": ("mean", "cls", "weightedmean"), "include_prompt": include_prompt}
    padded, inputs = embedder("bert", "sdpa", **settings), texts((5, 1, 40, 12, 3))
    expected = [padded.encode(inputs, prompt=p, batch_size=3, convert_to_tensor=True) for p in (None, "w1 w2 ")]
    for actual in world2.run(encode_shared, include_prompt):
        assert all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(actual, expected))


def count_exchanged(size: int):
    """Elements of every all-reduce of one forward, and the size of one hidden state."""
    mesh = SequenceMesh.build(size)
    model = pack_embeddings(embedder("bert", "ulysses", "mean"), mesh).eval()
    features = model.preprocess(texts(DOCUMENTS))
    sizes, own = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return own(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        model(features)
    finally:
        dist.all_reduce = own
    return sizes, features["input_ids"].numel()


def test_pooling_exchanges_one_vector_a_document(world2):
    for sizes, num_tokens in world2.run(count_exchanged, 2):
        assert sizes == [len(DOCUMENTS) * 48]
        assert num_tokens == sum(DOCUMENTS) > len(DOCUMENTS)


# Refusals


def refusals():
    from sentence_transformers.sentence_transformer.modules import LSTM

    mesh, messages = SequenceMesh.build(2), []

    def record(call):
        try:
            call()
        except (ValueError, NotImplementedError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    record(lambda: pack_embeddings(embedder("bert", "packed"), mesh))
    with_lstm = embedder("bert", "ulysses")
    with_lstm.insert(1, LSTM(48, 24).double())
    record(lambda: pack_embeddings(with_lstm, mesh))
    model = pack_embeddings(embedder("bert", "ulysses"), mesh)
    record(lambda: model.encode(texts((3, 4)), output_value="token_embeddings"))
    padded = embedder("bert", "ulysses").preprocess(texts((3, 4)))
    record(lambda: model(padded))
    pack_embeddings(model)
    messages.append(len(model.encode(texts((3, 4)), output_value="token_embeddings")))
    return messages


def test_refusals_under_shared_rows(world2):
    first, second = world2.run(refusals)
    assert first == second
    kernel_message, module_message, tokens_message, padded_message, count = first
    assert "runs attn_implementation='packed', which works on whole rows, with `sequence_par" in kernel_message
    assert "`LSTM` reads texts side by side, which packed texts are not: use `Pooling`" in module_message
    assert "`output_value` ('token_embeddings') asks for the vector of every token, but" in tokens_message
    assert "reached a model whose rows are shared by 2 processes: query expansion, images" in padded_message
    assert count == 2

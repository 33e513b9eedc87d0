"""Every loss of the installed sentence-transformers on packed texts: equal to padded ones, or refused by name."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
import torch


pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses

from hf_longctx.embedding.held_models import held_models, pad_for_held_models, unpad_for_held_models
from hf_longctx.embedding.packed_model import pack_embeddings

from ..embedding import columns, embedder
from ..embedding_losses import CASES, A, B, Case, built, guide, numbers
from .test_embedding import TOLERANCE, assert_same_gradients


SERVED = {name: case for name, case in CASES.items() if case.refused is None}
GUIDED = [name for name in CASES if "GIST" in name or "guide" in name]


def test_every_loss_of_the_installed_version_is_in_the_table():
    installed = {name for name, value in vars(losses).items() if inspect.isclass(value)}
    installed = {name for name in installed if issubclass(getattr(losses, name), torch.nn.Module)}
    assert installed == {name.partition(" ")[0] for name in CASES}


@pytest.mark.parametrize("name", SERVED)
def test_every_loss_gives_the_padded_loss_and_gradients(name):
    case, padded, packed = CASES[name], embedder("bert"), embedder("bert", "packed")
    expected_loss, expected = numbers(case, padded, built(case, padded))
    # Built before the model is packed, so that copies in it are not.
    loss = built(case, packed)
    pack_embeddings(packed)
    pad_for_held_models(loss, packed)
    actual_loss, actual = numbers(case, packed, loss)
    assert torch.allclose(actual_loss, expected_loss, rtol=TOLERANCE)
    assert_same_gradients(expected, actual)


@pytest.mark.parametrize("name", GUIDED)
def test_a_packed_guide_reads_the_row_from_its_own_positions(name):
    case, padded = CASES[name], embedder("bert")
    expected_loss, expected = numbers(case, padded, built(case, padded))
    packed = pack_embeddings(embedder("bert", "packed"))
    loss = built(case, packed)
    for held in held_models(loss, packed).values():
        held[0].model.set_attn_implementation("packed")
        pack_embeddings(held)
    actual_loss, actual = numbers(case, packed, loss)
    assert torch.allclose(actual_loss, expected_loss, rtol=TOLERANCE)
    assert_same_gradients(expected, actual)


@pytest.mark.parametrize("name", [*GUIDED, "ContrastiveTensionLoss"])
def test_without_a_trainer_of_ours_a_model_that_is_not_packed_is_refused(name):
    packed = embedder("bert", "packed")
    loss = built(CASES[name], packed)
    pack_embeddings(packed)
    with pytest.raises(ValueError, match="token ids of several texts in one row reached a model that is not packed"):
        numbers(CASES[name], packed, loss)
    pad_for_held_models(loss, packed)
    unpad_for_held_models(loss, packed)
    with pytest.raises(ValueError, match="reached a model that is not packed"):
        numbers(CASES[name], packed, loss)


READERS = {
    "embedding": lambda ids, table: torch.nn.functional.embedding(ids, table),
    "part of the row": lambda ids, table: torch.nn.functional.embedding(ids[:, :-1].clone(), table),
    "moved": lambda ids, table: torch.nn.functional.embedding(ids.to("cpu", non_blocking=True) + 1, table),
    "index": lambda ids, table: table[ids[0]],
    "index_select": lambda ids, table: table.index_select(0, ids.flatten()),
    "copied": lambda ids, table: torch.nn.functional.embedding(copy.deepcopy(ids), table),
    "joined": lambda ids, table: torch.nn.functional.embedding(torch.cat(ids.split(2, 1), 1), table),
}


@pytest.mark.parametrize("reader", READERS)
def test_any_model_that_looks_up_a_flat_row_is_refused(reader):
    packed = pack_embeddings(embedder("bert", "packed"))
    ids, table = columns(packed, A)[0]["input_ids"], torch.randn(300, 4)
    with pytest.raises(ValueError, match="reached a model that is not packed"):
        READERS[reader](ids, table)
    # What is no lookup of vectors is an ordinary tensor.
    weights = torch.rand(300)[ids] * (ids != 7)
    assert type(weights) is torch.Tensor and type(ids.float()) is torch.Tensor


def test_workers_bring_rows_that_are_still_known_as_flat():
    from torch.utils.data import DataLoader

    packed = pack_embeddings(embedder("bert", "packed"))
    loader = DataLoader(["w1 w2", "w3"], batch_size=2, num_workers=1, collate_fn=packed.preprocess)
    (features,) = loader
    assert type(features["input_ids"]) is type(packed.preprocess(["w1 w2", "w3"])["input_ids"]) is not torch.Tensor


class Distillation(torch.nn.Module):
    """A loss of one's own: the model, its teacher in a list, and a second look at the same features."""

    def __init__(self, model, teacher) -> None:
        super().__init__()
        self.student, self.teachers = model, [teacher]

    def forward(self, features, labels=None):
        features = list(features)
        first = [self.student(each)["sentence_embedding"] for each in features]
        with torch.no_grad():
            targets = [self.teachers[0](each)["sentence_embedding"] for each in features]
        again = [self.student(each)["sentence_embedding"] for each in features]
        return sum(((x - y) ** 2).mean() + (x * z).mean() for x, y, z in zip(first, targets, again))


@pytest.mark.parametrize("student", ["bert", "llama", "modernbert"])
def test_features_may_go_through_several_models_and_the_same_one_twice(student):
    case = Case(lambda model: Distillation(model, guide()), (A, B))
    padded, packed = embedder(student), pack_embeddings(embedder(student, "packed"))
    expected_loss, expected = numbers(case, padded, built(case, padded))
    loss = built(case, packed)
    pad_for_held_models(loss, packed)
    actual_loss, actual = numbers(case, packed, loss)
    assert torch.allclose(actual_loss, expected_loss, rtol=TOLERANCE)
    assert_same_gradients(expected, actual)


def test_features_may_be_given_by_name():
    packed, teacher = pack_embeddings(embedder("bert", "packed")), guide()
    loss = built(Case(lambda model: Distillation(model, teacher), (A,)), packed)
    pad_for_held_models(loss, packed)
    for model in (packed, teacher):
        (features,), (again,) = columns(packed, A), columns(packed, A)
        expected = model(features)["sentence_embedding"]
        assert torch.equal(model(input=again)["sentence_embedding"], expected)


# In a trainer


def trained(loss, model, label=None, **changes) -> dict:
    from datasets import Dataset

    from hf_longctx import LongContextSentenceTransformerTrainer

    from ..embedding import texts
    from ..embedding_training import arguments

    rows = {"anchor": texts(A), "positive": texts(B, 100)} | ({} if label is None else {"label": label})
    trainer = LongContextSentenceTransformerTrainer(
        model=model,
        args=arguments(changes.pop("folder"), max_steps=1, **changes),
        train_dataset=Dataset.from_dict(rows),
        loss=loss,
    )
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_losses_that_read_rows_of_tokens_are_refused_by_name_before_step_one(name, tmp_path):
    model = embedder("bert", "packed")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=re.escape(CASES[name].refused)):
        trained(built(CASES[name], model), model, folder=str(tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_loss_of_ones_own_that_reads_rows_is_refused_by_name(tmp_path):
    class Rows(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, features, labels=None):
            return (self.model(features[0])["sentence_embedding"] * features[0]["attention_mask"].sum()).sum()

    model = embedder("bert", "packed")
    with pytest.raises(NotImplementedError, match=r"`Rows` reads rows of tokens"):
        trained(Rows(model), model, folder=str(tmp_path))


@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_the_trainer_gives_a_guide_what_it_had_padded(name, tmp_path):
    from sentence_transformers import SentenceTransformerTrainer

    from ..embedding import texts
    from ..embedding_training import arguments

    padded, packed = embedder("bert"), embedder("bert", "packed")
    from datasets import Dataset

    stock = SentenceTransformerTrainer(
        model=padded,
        args=arguments(str(tmp_path), max_steps=1),
        train_dataset=Dataset.from_dict({"anchor": texts(A), "positive": texts(B, 100)}),
        loss=built(CASES[name], padded),
    )
    stock.train()
    expected, actual = stock.state.log_history[0], trained(built(CASES[name], packed), packed, folder=str(tmp_path))
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)

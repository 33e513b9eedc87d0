"""Losses of sentence-transformers on several processes: who holds the model, under any name, and what they train."""

from __future__ import annotations

import tempfile

import pytest
import torch


pytest.importorskip("sentence_transformers")

from datasets import Dataset

from hf_longctx import LongContextConfig, LongContextSentenceTransformerTrainer

from ..embedding import embedder, texts
from ..embedding_losses import CASES, built, guide
from ..embedding_training import arguments, assert_same_run
from ..training import reset_state


TOLERANCE = 1e-8


class Named(torch.nn.Module):
    """Triplets of a loss of one's own: every row's loss is its own, so ranks with other rows equal one process."""

    def __init__(self, model, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "encoder":
            self.encoder = model
        elif how == "list":
            self.kept = [model]
        elif how == "dict":
            self.kept = {"student": model}
        elif how == "inner":
            self.part = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.Identity())})
            self.part["a"].student = model
        elif how == "closure":
            self.call = lambda features: model(features)
        elif how == "guided":  # an attribute `model` that is another one
            self.encoder, self.model = model, guide()

    def forward(self, features, labels=None):
        encode = {
            "encoder": lambda each: self.encoder(each),
            "list": lambda each: self.kept[0](each),
            "dict": lambda each: self.kept["student"](each),
            "inner": lambda each: self.part["a"].student(each),
            "closure": lambda each: self.call(each),
            "guided": lambda each: self.encoder(each),
        }[self.how]
        anchors, positives = (encode(each)["sentence_embedding"] for each in features)
        loss = (anchors * positives).sum(1).mean()
        if self.how == "guided":
            with torch.no_grad():
                target = self.model(features[0])["sentence_embedding"]
            loss = loss + ((anchors - target) ** 2).mean()
        return loss


def loss_named(name: str, model):
    if name in CASES:
        return built(CASES[name], model)
    return Named(model, name)


def train(name: str, batch: int = 4, size: int = 1, seed: int = 0) -> dict:
    reset_state()
    model = embedder("bert", "ulysses" if size > 1 else "packed")
    lengths = [2 + (7 * index) % 19 for index in range(24)]
    rows = {"anchor": texts(tuple(lengths)), "positive": texts(tuple(reversed(lengths)), 500)}
    if name in CASES and CASES[name].labels is not None:
        rows["label"] = [index % 2 for index in range(24)]
    loss = loss_named(name, model)
    if seed:  # as if built without a seed: other values on every rank
        with torch.no_grad():
            loss.classifier.weight.add_(seed)
    trainer = LongContextSentenceTransformerTrainer(
        model=model,
        args=arguments(tempfile.mkdtemp(), per_device_train_batch_size=batch, learning_rate=1e-2),
        train_dataset=Dataset.from_dict(rows),
        loss=loss,
        long_context=LongContextConfig(sequence_parallel_size=size, check_replicas=1),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
    own = {f"loss.{key}": value.detach().clone() for key, value in loss.named_parameters() if "classifier" in key}
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "weights": weights | own,
    }


def train_all(calls: list[tuple]) -> list:
    """Runs one after the other; what was raised instead."""
    results = []
    for call in calls:
        try:
            results.append(train(*call))
        except (NotImplementedError, RuntimeError) as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def test_the_model_is_wrapped_under_any_name_and_what_losses_train_is_averaged(world2):
    names = ("encoder", "list", "dict", "inner", "guided", "SoftmaxLoss")
    for ranks in [world2.run(train_all, [(name, 2) for name in names])]:
        for actual in ranks:
            for name, run in zip(names, actual):
                assert not isinstance(run, str), (name, run)
                assert_same_run(train(name), run, TOLERANCE)


def train_from_other_values() -> dict:
    import torch.distributed as dist

    return train("SoftmaxLoss", 2, 1, dist.get_rank())


def test_what_losses_train_starts_from_the_first_ranks_values(world2):
    expected = train("SoftmaxLoss")
    for actual in world2.run(train_from_other_values):
        assert_same_run(expected, actual, TOLERANCE)


def test_a_hidden_model_and_a_trained_copy_are_refused_on_several_processes(world2):
    for closure, copied in world2.run(train_all, [("closure", 2), ("ContrastiveTensionLoss", 2)]):
        assert closure.startswith("NotImplementedError: the loss calls the bare `SentenceTransformer`")
        assert copied.startswith("NotImplementedError: `ContrastiveTensionLoss.model1` is trained next to the model")


def test_guides_and_what_losses_train_on_shared_documents(world2):
    names = ("GISTEmbedLoss", "CachedGISTEmbedLoss", "guided", "SoftmaxLoss", "MatryoshkaLoss with a guide")
    expected = [train(name) for name in names]
    for actual in world2.run(train_all, [(name, 4, 2) for name in names]):
        for name, one, run in zip(names, expected, actual):
            assert not isinstance(run, str), (name, run)
            assert_same_run(one, run, TOLERANCE)

"""Losses of sentence-transformers on several processes: who holds the model, under any name, and what they train."""

from __future__ import annotations

import tempfile

import pytest
import torch


pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers.sentence_transformer import losses

from hf_longctx import (
    LongContextConfig,
    LongContextSentenceTransformerTrainer,
    TiledMultipleNegativesRankingLoss,
)

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


def evaluate(name: str, batch: int, size: int, rows: int, streamed: bool) -> dict:
    """`eval_loss` of the untrained model, on the ranks of a world or on one process."""
    reset_state()
    model = embedder("bert", "ulysses" if size > 1 else "packed")
    lengths = [2 + (7 * index) % 19 for index in range(rows)]
    data = Dataset.from_dict({"anchor": texts(tuple(lengths)), "positive": texts(tuple(reversed(lengths)), 500)})
    trainer = LongContextSentenceTransformerTrainer(
        model=model,
        args=arguments(tempfile.mkdtemp(), per_device_eval_batch_size=batch),
        eval_dataset=data.to_iterable_dataset() if streamed else data,
        loss=evaluated_loss(name, model),
        long_context=LongContextConfig(sequence_parallel_size=size),
    )
    logged = trainer.evaluate()
    return {key: value for key, value in logged.items() if "loss" in key or key.startswith("eval_sum")}


def evaluated_loss(name: str, model):
    if name == "tiled":
        return TiledMultipleNegativesRankingLoss(model, mini_batch_size=3, loss_tile_size=3)
    if name == "gathering":
        return losses.MultipleNegativesRankingLoss(model, gather_across_devices=True)
    return losses.MultipleNegativesRankingLoss(model)


def evaluate_all(calls: list[tuple]) -> list[dict]:
    return [evaluate(*call) for call in calls]


def padded_evaluation(batch: int, rows: int, streamed: bool = False) -> float:
    """sentence-transformers' own, padded; of a stream by hand, since its trainer counts a short last batch in full."""
    from sentence_transformers import SentenceTransformerTrainer

    reset_state()
    model = embedder("bert")
    lengths = [2 + (7 * index) % 19 for index in range(rows)]
    data = {"anchor": texts(tuple(lengths)), "positive": texts(tuple(reversed(lengths)), 500)}
    loss = losses.MultipleNegativesRankingLoss(model)
    if streamed:
        model.eval()
        total = 0.0
        for begin in range(0, rows, batch):
            columns = [column[begin : begin + batch] for column in data.values()]
            with torch.no_grad():
                total += float(loss([model.preprocess(column) for column in columns], None)) * len(columns[0])
        return total / rows
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(tempfile.mkdtemp(), per_device_eval_batch_size=batch),
        eval_dataset=Dataset.from_dict(data),
        loss=loss,
    )
    return trainer.evaluate()["eval_loss"]


# Ragged in every way: a short last batch, a last round without a batch for one group, less rows than groups.
SIZES = (10, 6, 1)


def test_the_evaluation_loss_of_a_ragged_set_is_one_process_mean_over_rows(world2, world4):
    cases = [(10, True), *((rows, False) for rows in SIZES)]
    expected = {case: padded_evaluation(4, *case) for case in cases}
    for rows, streamed in cases:
        one = evaluate("mnrl", 4, 1, rows, streamed)["eval_loss"]
        assert one == pytest.approx(expected[rows, streamed], rel=1e-6, abs=1e-9), (rows, streamed)
    for world, size in ((world2, 1), (world2, 2), (world4, 2)):
        for ranks in world.run(evaluate_all, [("mnrl", 4, size, *case) for case in cases]):
            for case, actual in zip(cases, ranks):
                assert actual["eval_loss"] == pytest.approx(expected[case], rel=1e-6, abs=1e-9), (case, size)


def test_negatives_from_all_groups_are_evaluated_as_on_one_process(world2):
    expected = {rows: padded_evaluation(4, rows) for rows in SIZES}
    calls = [(name, 2, 1, rows, False) for name in ("tiled", "gathering") for rows in SIZES]
    for ranks in world2.run(evaluate_all, calls):
        for (_, _, _, rows, _), actual in zip(calls, ranks):
            assert actual["eval_loss"] == pytest.approx(expected[rows], rel=1e-6, abs=1e-9), rows

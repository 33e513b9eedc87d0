"""`LongContextSentenceTransformerTrainer` on several processes equals one process, step by step."""

from __future__ import annotations

import pytest


pytest.importorskip("sentence_transformers")

from ..embedding_training import assert_same_run, run


TOLERANCE = 1e-8  # float64, but logged losses and sums in another order


def one_process(**settings) -> dict:
    return run(**{**settings, "attention": "packed"})


@pytest.mark.parametrize("loss", ["tiled", "tiled cached", "mnrl", "matryoshka"])
def test_two_ranks_sharing_documents_train_as_one_process(world2, loss):
    expected = one_process(loss=loss)
    for actual in world2.run(run_with, {"loss": loss, "config": {"sequence_parallel_size": 2}}):
        assert_same_run(expected, actual, TOLERANCE)


def run_with(settings: dict) -> dict:
    return run(**settings)


@pytest.mark.parametrize("data", ["sources", "triplets", "streams", "stream"])
def test_two_groups_of_two_train_on_global_negatives_as_one_process(world4, data):
    config = {"source_weights": {"short": 1, "long": 2}} if data in ("sources", "streams") else {}
    settings = {"data": data, "loss": "tiled cached"}
    expected = one_process(**settings, config=config, per_device_train_batch_size=8)
    sharded = {**settings, "config": {**config, "sequence_parallel_size": 2}, "per_device_train_batch_size": 4}
    for actual in world4.run(run_with, sharded):
        assert_same_run(expected, actual, TOLERANCE)

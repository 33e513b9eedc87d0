"""`LongContextSentenceTransformerTrainer` on several processes equals one process, step by step."""

from __future__ import annotations

import pytest


pytest.importorskip("sentence_transformers")

from ..embedding_training import assert_same_run, build_trainer, run


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


def test_spans_of_shared_documents_train_as_one_process(world4):
    settings = {"data": "spans", "loss": "spans"}
    expected = one_process(**settings, per_device_train_batch_size=8)
    for actual in world4.run(run_with, {**settings, "config": {"sequence_parallel_size": 2}}):
        assert_same_run(expected, actual, TOLERANCE)


@pytest.mark.parametrize("data", ["sources", "triplets", "streams", "stream"])
def test_two_groups_of_two_train_on_global_negatives_as_one_process(world4, data):
    sources = {"source_weights": {"short": 1, "long": 2}} if data in ("sources", "streams") else {}
    settings = {"data": data, "loss": "tiled cached", "sources": sources}
    expected = one_process(**settings, per_device_train_batch_size=8)
    sharded = {**settings, "config": {"sequence_parallel_size": 2}, "per_device_train_batch_size": 4}
    for actual in world4.run(run_with, sharded):
        assert_same_run(expected, actual, TOLERANCE)


def test_evaluators_and_evaluation_loss_of_a_sharded_run(world2):
    settings = {"loss": "tiled", "evaluates": True, "eval_strategy": "steps", "eval_steps": 2}
    expected = one_process(**settings)
    for actual in world2.run(run_with, {**settings, "config": {"sequence_parallel_size": 2}}):
        assert_same_run(expected, actual, TOLERANCE)
        for name, value in expected["scores"].items():
            if "cosine" in name or name == "eval_loss":
                assert actual["scores"][name] == pytest.approx(value, rel=1e-6), name


def test_evaluating_before_training_leaves_no_trace(world2):
    settings = {"loss": "tiled", "evaluates": True, "per_device_train_batch_size": 4}
    expected = one_process(**{**settings, "per_device_train_batch_size": 8})
    for actual in world2.run(run_with, {**settings, "evaluates_first": True}):
        assert_same_run(expected, actual, TOLERANCE)


def test_ring_and_learnable_temperature_on_two_groups(world2):
    for loss in ("tiled ring", "learnable"):
        expected = one_process(loss=loss, per_device_train_batch_size=8)
        for actual in world2.run(run_with, {"loss": loss, "per_device_train_batch_size": 4}):
            assert_same_run(expected, actual, TOLERANCE)


def encode_alone() -> list[float]:
    import torch.distributed as dist

    trainer = build_trainer(config={"sequence_parallel_size": 2}, max_steps=1)
    trainer.train()
    vector = trainer.model.encode("w1 w2 w3") if dist.get_rank() == 0 else None  # the other rank encodes nothing
    dist.barrier()
    return [] if vector is None else vector.tolist()


def test_after_training_one_process_encodes_alone(world2):
    first, _ = world2.run(encode_alone)
    assert len(first) == 48


def refusals() -> list[str]:
    from sentence_transformers.base.training_args import MultiDatasetBatchSamplers

    sampler = {"multi_dataset_batch_sampler": MultiDatasetBatchSamplers.ROUND_ROBIN}
    cases = [{"loss": "gathering", "config": {"sequence_parallel_size": 2}}, {"data": "sources", **sampler}]
    messages = []
    for settings in cases:
        try:
            build_trainer(**settings).train()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_refusals_of_a_sharded_run(world2):
    for gathering_message, order_message in world2.run(refusals):
        assert "`MultipleNegativesRankingLoss(gather_across_devices=True)` gathers from all 2" in gathering_message
        assert "lets each of 2 groups draw from another source in the same step" in order_message

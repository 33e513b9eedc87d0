"""`LongContextDPOTrainer`, `LongContextKTOTrainer` and `LongContextRewardTrainer` equal TRL's in one process: weights,
losses and every metric that is logged, step by step."""

from __future__ import annotations

import pytest


pytest.importorskip("trl")

from hf_longctx.reporting.meter import ThroughputMeter
from hf_longctx.trainer.whole_rows import rows_shared

from ..preference import compare, fit, pairs, trainer_of, worst


def test_dpo_on_two_groups(world4):
    """Ten steps of accumulation 3, evaluated; also several losses at once, and a reference that follows."""
    compare(
        world4,
        2,
        max_steps=10,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=1,
        loss_type=["sigmoid", "ipo"],
        loss_weights=[1.0, 0.5],
        sync_ref_model=True,
        ref_model_sync_steps=3,
    )


def test_dpo_with_evaluation_and_numbers_of_the_reference_computed_ahead(world2, tmp_path):
    for size in (0, 2):
        pairs().save_to_disk(str(tmp_path / str(size)))
    compare(
        world2,
        2,
        evaluate=True,
        precompute_ref_log_probs=True,
        per_device_eval_batch_size=2,
        folder=str(tmp_path),
    )


def test_dpo_with_lora_and_no_reference_model(world2):
    compare(world2, 2, lora=True, reference="none", gradient_checkpointing=True, memory={"memory": "max"})


def test_dpo_flattened(world2):
    """On shared rows, with MLPs of both models in tiles, and on one process alone."""
    compare(world2, 2, flatten=True, evaluate=True, memory={"mlp_tile_size": 8})
    alone = fit(1, {"flatten": True, "attention": "packed"})
    assert worst(alone[1], fit(0, {})[1]) <= 2e-5


def test_kto(world4):
    compare(world4, 4, task="kto", max_steps=10, per_device_train_batch_size=4, evaluate=True)


def test_reward(world4):
    """Ten steps of accumulation 3 on two groups, with margins."""
    changes = {"max_steps": 10, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}
    compare(world4, 2, task="margin", center_rewards_coefficient=0.1, **changes)


def counted_tokens(size: int) -> list[int]:
    """What all ranks together count of one batch, for the speed in the log, and what it has."""
    import torch.distributed as dist

    trainer, meter = trainer_of(size), ThroughputMeter()
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset.select(range(3))])
    with rows_shared(trainer.sharing, trainer.model):
        meter._see_batch(trainer.model.train(), (), {**batch})
    found = meter._batches[0][0]
    dist.all_reduce(found)
    return [int(found), int(batch["attention_mask"].sum())]


def test_the_meter_counts_the_rows_of_a_group_once(world2):
    for found, expected in world2.run(counted_tokens, 2):
        assert found == expected

"""Evaluation, checkpoints and the hazard of transformers around them, under sharding."""

from __future__ import annotations

import pytest
import torch

from ..models import build
from ..training import Rows, Stream, assert_same_trajectory, pad_right, steps, train


def run_here(size, options):
    return train(size, **options)


def token_mean_of(model, rows) -> float:
    """The reference of `eval_loss`: one row at a time, one process, summed over all tokens of the set."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows.rows:
            batch = pad_right([row])
            valid = int((batch["labels"][:, 1:] != -100).sum())
            if valid:
                total += float(model(**batch).loss) * valid
                count += valid
    return total / count


@pytest.mark.parametrize(
    ("world_size", "size", "count", "stream"),
    [(2, 2, 7, False), (4, 4, 7, False), (2, 1, 7, False), (4, 2, 7, False), (4, 2, 8, False), (4, 2, 7, True)],
)
def test_eval_loss_is_the_mean_over_all_tokens(worlds, world_size, size, count, stream):
    rows = Rows(count)
    expected = token_mean_of(build("llama", "sdpa").eval(), rows)
    options = {
        "after": "evaluate_first",
        "trainer_options": {"eval_dataset": Stream(rows) if stream else rows},
        "per_device_eval_batch_size": 2,
    }
    for history, _, extra in worlds(world_size).run(run_here, size, options):
        assert extra["before"]["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert len(steps(history)) == 4


def test_evaluating_before_training_leaves_no_trace(world4):
    options = {"trainer_options": {"eval_dataset": Rows(4)}}
    plain = world4.run(run_here, 2, options)
    evaluated = world4.run(run_here, 2, {**options, "after": "evaluate_first"})
    for actual in evaluated:
        assert actual[2]["wrapped"] == "DistributedDataParallel"
        assert_same_trajectory(actual, plain[0], 1e-6)


def test_eval_strategy_runs_sharded_during_training(world2):
    options = {"trainer_options": {"eval_dataset": Rows(5)}, "eval_strategy": "steps", "eval_steps": 2}
    expected = [entry["eval_loss"] for entry in train(1, **options)[0] if "eval_loss" in entry]
    assert len(expected) == 2 and expected[0] != expected[1]
    for history, _, _ in world2.run(run_here, 2, options):
        assert [entry["eval_loss"] for entry in history if "eval_loss" in entry] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("resumed_size", [2, 4, 1])
def test_a_resumed_run_equals_the_uninterrupted_one(worlds, tmp_path, resumed_size):
    """Saved with 2 x 2 ranks; resumed with the same, with 1 x 4 and in one process: same rows, same steps."""
    options = {"num_train_epochs": 3, "max_steps": 8, "rows": Rows(16), "optim": "sgd", "lr_scheduler_type": "linear"}
    two_groups = {**options, "per_device_train_batch_size": 2}
    whole = worlds(4).run(run_here, 2, two_groups)[0]
    saving = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 5}
    worlds(4).run(run_here, 2, {**two_groups, **saving})
    resuming = {**options, "output_dir": str(tmp_path), "resume": str(tmp_path / "checkpoint-5")}
    if resumed_size == 1:
        results = [train(1, per_device_train_batch_size=4, **resuming)]
    else:
        batch = 2 if resumed_size == 2 else 4
        results = worlds(4).run(run_here, resumed_size, {**resuming, "per_device_train_batch_size": batch})
    for actual in results:
        assert_same_trajectory(actual, whole)


def test_several_eval_sets_and_their_speed(world4):
    """Seven rows, two groups, two rows each: two steps, which is what the speed must count."""
    sets = {"short": Rows(7), "long": Rows(8, tokens=30)}
    options = {"trainer_options": {"eval_dataset": sets}, "per_device_eval_batch_size": 2, "after": "evaluate_first"}
    model = build("llama", "sdpa").eval()
    for _, _, extra in world4.run(run_here, 2, options):
        for name, rows in sets.items():
            assert extra["before"][f"eval_{name}_loss"] == pytest.approx(token_mean_of(model, rows), rel=1e-6)
            runtime, speed = extra["before"][f"eval_{name}_runtime"], extra["before"][f"eval_{name}_steps_per_second"]
            assert speed == pytest.approx(2 / runtime, rel=0.02)

"""Whole trajectories of `LongContextTrainer` equal the stock `Trainer` in one process: losses, gradient norms, weights.

Tolerance 1e-5 relative in fp32: four steps at a large learning rate amplify the noise of reordered sums (1e-7) by less than 100.
"""

from __future__ import annotations

import pytest

from ..training import Rows, Stream, assert_same_trajectory, train


def compare(world, size, tolerance=1e-5, **options):
    data_parallel = world.size // size
    batch = options.pop("per_device_train_batch_size", 2)
    expected = train(0, per_device_train_batch_size=batch * data_parallel, **options)
    results = world.run(run_here, size, {"per_device_train_batch_size": batch, **options})
    for actual in results:
        assert_same_trajectory(actual, expected, tolerance)
    return expected, results


def run_here(size, options):
    return train(size, **options)


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4), (4, 2), (2, 1)])
def test_mesh_shapes_equal_one_process(worlds, world_size, size):
    expected, results = compare(worlds(world_size), size)
    for _, _, extra in results:
        assert extra["wrapped"] == "DistributedDataParallel"
        assert extra["total_train_batch_size"] == 2 * world_size // size


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 2)])
def test_accumulation_with_uneven_valid_tokens(worlds, world_size, size):
    compare(worlds(world_size), size, gradient_accumulation_steps=3, num_train_epochs=4, rows=Rows(24))

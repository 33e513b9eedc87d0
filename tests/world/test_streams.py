"""Training streams: read again where they end, assigned by shards of any length, and never waited for.

Tolerances are those of [`assert_same_trajectory`].
"""

from __future__ import annotations

import tempfile

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from hf_longctx import LongContextTrainer, PackingCollator
from hf_longctx.data.endless import endless_loader
from hf_longctx.proof.ranks import RanksError
from hf_longctx.resilience.checkpoints import run_facts

from ..embedding_training import build_trainer
from ..models import build
from ..training import Rows, Stream, arguments, assert_same_trajectory, reset_state, train


ROWS = Rows(11).rows
SHARDS = {"short": ROWS[:3], "long": ROWS[3:]}


def rows_of(shards):
    for name in shards:
        yield from SHARDS[name]


def uneven_stream():
    return datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shards": list(SHARDS)})


def as_read_by_two_groups(steps: int, accumulation: int) -> list[dict]:
    """The rows of all steps, where each group reads its own shard again and again."""
    rows = []
    for step in range(steps):
        for shard in SHARDS.values():
            rows += [shard[(step * accumulation + i) % len(shard)] for i in range(accumulation)]
    return rows


def train_with(size, options):
    return train(size, **options)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("attention", "collator"), [("ulysses", None), ("packed", PackingCollator()), ("sdpa", None)])
def test_groups_whose_shards_end_at_different_steps_train_alike(world2, accumulation, attention, collator):
    """The short one ends in the middle of a step of two batches."""
    flow = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    rows = Rows()
    rows.rows = as_read_by_two_groups(4, accumulation)
    order = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2 * accumulation}
    expected = train(0, rows=rows, **order)
    options = {"rows": uneven_stream(), "attention": attention, **flow}
    if collator is not None:
        options["trainer_options"] = {"data_collator": collator}
    actual = world2.run(train_with, 1, options)
    for ranks in actual:
        assert_same_trajectory(ranks, expected)


def shards_in_checkpoints():
    """What a run on two groups writes down, of a language model and of an embedder, which reads all shards."""
    reset_state()
    assigned = LongContextTrainer(
        model=build("llama", "packed"), args=arguments(tempfile.mkdtemp()), train_dataset=uneven_stream()
    )
    reset_state()
    read_by_all = build_trainer(data="stream")
    read_by_all.train_dataset = uneven_stream()
    return run_facts(assigned)["stream_shards"], run_facts(read_by_all)["stream_shards"]


def test_only_runs_whose_groups_read_their_own_shards_are_bound_to_their_number(world2):
    assert world2.run(shards_in_checkpoints) == [(2, None)] * 2


def test_a_step_of_several_batches_goes_on_where_the_stream_begins_again():
    rows = Rows()
    rows.rows = [ROWS[i % 5] for i in range(16)]
    first = Rows()
    first.rows = ROWS[:5]
    expected = train(0, rows=rows, train_sampling_strategy="sequential", per_device_train_batch_size=4)
    actual = train(
        1, rows=Stream(first), attention="packed", per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert_same_trajectory(actual, expected)


class Counting(IterableDataset):
    """Numbers that tell the pass they were read in."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter([10 * self.epoch + i for i in range(self.count)])


@pytest.mark.parametrize("workers", [0, 2])
def test_passes_end_together_and_are_told_their_number(workers):
    batches = iter(endless_loader(DataLoader(Counting(3), batch_size=2, num_workers=workers)))
    copies = max(1, workers)
    read = [batch.tolist() for _, batch in zip(range(4 * copies), batches)]
    assert read == [batch for epoch in (0, 10) for batch in [[epoch, epoch + 1]] * copies + [[epoch + 2]] * copies]


def test_a_stream_that_can_be_read_only_once_ends():
    once = iter(range(3))

    class Once(IterableDataset):
        def __iter__(self):
            return once

    assert [batch.tolist() for batch in endless_loader(DataLoader(Once(), batch_size=2))] == [[0, 1], [2]]


def test_a_stream_without_a_row_is_refused():
    nothing = Rows()
    nothing.rows = []
    with pytest.raises(ValueError, match="`train_dataset` is a stream without a row .*filtered by"):
        train(1, rows=Stream(nothing), attention="packed")


@pytest.mark.parametrize(("data", "workers"), [("torch", 2), ("torch", 1), ("hub", 2)])
def test_workers_that_each_read_everything_are_told_of(caplog, data, workers):
    rows = Stream(Rows()) if data == "torch" else uneven_stream()
    train(1, rows=rows, attention="packed", dataloader_num_workers=workers)
    told = "each worker reads all of `Stream` unless" in caplog.text
    assert told == (data == "torch" and workers == 2)


def train_with_dispatcher(name):
    train(1, rows=Stream(Rows()), attention="packed", accelerator_config={name: True})


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_dealing_a_stream_by_pieces_of_batches_is_refused(world2, name):
    with pytest.raises(RanksError, match=rf"`accelerator_config.{name}` \(True\) .*reads a training stream itself"):
        world2.run(train_with_dispatcher, name)


@pytest.mark.parametrize("name", ["logging_strategy", "eval_strategy", "save_strategy"])
def test_waiting_for_the_end_of_a_stream_is_refused(name):
    options = {name: "epoch", "trainer_options": {"eval_dataset": Rows(4)}}
    with pytest.raises(ValueError, match=rf"`{name}` \('epoch'\) has no epoch to wait for.*to 'steps'"):
        train(1, rows=Stream(Rows()), attention="packed", **options)
    assert torch.isfinite(train(1, rows=Rows(), attention="packed", **options)[1]["lm_head.weight"]).all()

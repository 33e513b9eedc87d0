"""Trainers on blends: the same rows, losses and figures of each source whatever the split into groups and shards.

Tolerance 1e-5 of a loss: sums over some hundred tokens in another order, four steps long in float32.
"""

from __future__ import annotations

import tempfile

import pytest
import torch

from hf_longctx import BlendedRows, BlendReport, LongContextConfig, LongContextTrainer, MemoryConfig, PackingCollator

from ..models import build
from ..training import Rows, arguments, pad_right, reset_state, steps, weights_of


NAMES = ("code", "books")
PACKED = PackingCollator(max_tokens=48, strategy="in_order")
CASES = {
    "padded": {},
    "tiled": {"memory": MemoryConfig(loss_tile_size=16)},
    "flat": {"data_collator": PackingCollator(), "remove_unused_columns": True},
    "packed": {"data_collator": PACKED},
}


def blend() -> BlendedRows:
    return BlendedRows({"code": (Rows(16), 0.4), "books": (Rows(6, tokens=13), 0.6)}, 200, seed=1)


def trainer_of(size: int, groups: int, case: str, reports: bool = True, folder: str | None = None, **changes):
    """Eight rows, or packed rows, a step in any case."""
    reset_state()
    options = {"data_collator": pad_right, **CASES[case]}
    accumulation = {"gradient_accumulation_steps": 4 // groups, "logging_steps": 2, **changes}
    if "remove_unused_columns" in options:
        accumulation["remove_unused_columns"] = options.pop("remove_unused_columns")
    trainer = LongContextTrainer(
        model=build("llama", "ulysses" if size > 1 else "packed"),
        args=arguments(folder or tempfile.mkdtemp(), **accumulation),
        train_dataset=blend(),
        long_context=LongContextConfig(sequence_parallel_size=size),
        **options,
    )
    if reports:
        BlendReport().attach(trainer)
    return trainer


def logs_of(size: int, groups: int, case: str, **changes) -> list[dict[str, float]]:
    trainer = trainer_of(size, groups, case, **changes)
    trainer.train(resume_from_checkpoint=changes.get("resume"))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def all_logs(size: int, groups: int) -> list:
    return [logs_of(size, groups, case) for case in CASES]


@pytest.fixture(scope="module")
def one_process():
    return all_logs(1, 1)


def check(ours, theirs) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        for one, two in zip(mine, expected, strict=True):
            for name in ("loss", *(f"{what}/{name}" for what in ("loss", "tokens", "passes") for name in NAMES)):
                assert abs(one[name] - two[name]) <= 1e-5 * abs(two[name]), (name, one, two)


def test_two_ranks_a_row(world2, one_process):
    check(world2.run(all_logs, 2, 1)[0], one_process)


def test_two_groups_of_two_ranks(world4, one_process):
    for logs in world4.run(all_logs, 2, 2):
        check(logs, one_process)


def test_four_groups(world4, one_process):
    check(world4.run(all_logs, 1, 4)[0], one_process)


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_the_rows_in_order(case, one_process):
    logs, rows = one_process[list(CASES).index(case)], blend()
    targets = dict.fromkeys(NAMES, 0)
    tokens, read = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0)
    dataset = PACKED.pack(rows) if case == "packed" else None
    for number in range(16):
        for row in [rows[number]] if dataset is None else dataset[number]:
            source = "code" if rows.locate(sum(read.values()))[0] == "code" else "books"
            tokens[source] += len(row["input_ids"])
            targets[source] += sum(label != -100 for label in row["labels"][1:])
            read[source] += 1
    sizes = {"code": 16, "books": 6}
    for name in NAMES:
        assert logs[0][f"tokens/{name}"] == tokens[name]
        assert logs[0][f"passes/{name}"] == pytest.approx(read[name] / sizes[name])
    # The log is the mean of its steps, each over its own targets; the report weighs targets alike.
    total = sum(logs[0][f"loss/{name}"] * targets[name] for name in NAMES) / sum(targets.values())
    assert abs(total - logs[0]["loss"]) < 0.02 * total


def test_the_loss_of_each_source_is_that_of_its_rows():
    trainer = trainer_of(1, 1, "padded", logging_steps=1, max_steps=1)
    sums, counts = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0)
    model, rows = build("llama", "sdpa"), blend()
    for number in range(8):
        ids, labels = (torch.tensor([rows[number][key]]) for key in ("input_ids", "labels"))
        count, name = int((labels[:, 1:] != -100).sum()), rows.locate(number)[0]
        sums[name] += float(model(input_ids=ids, labels=labels).loss.detach()) * count
        counts[name] += count
    trainer.train()
    log = trainer.state.log_history[0]
    for name in NAMES:
        assert log[f"loss/{name}"] == pytest.approx(sums[name] / counts[name], rel=1e-5)
    weighted = sum(log[f"loss/{name}"] * counts[name] for name in NAMES) / sum(counts.values())
    assert weighted == pytest.approx(log["loss"], rel=1e-5)


@pytest.mark.parametrize("case", ["padded", "tiled", "packed"])
def test_a_report_changes_no_number_and_runs_no_forward(case):
    results = []
    for reports in (True, False):
        trainer, forwards = trainer_of(1, 1, case, reports=reports), []
        trainer.model.model.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        trainer.train()
        results.append((steps(trainer.state.log_history), weights_of(trainer), len(forwards)))
    (one, weights, forwards), (two, others, as_many) = results
    assert one == two and forwards == as_many
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_a_run_that_resumes_goes_on_counting():
    folder = tempfile.mkdtemp()
    settings = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    expected = logs_of(1, 1, "padded", folder=folder, **settings)
    trainer = trainer_of(1, 1, "padded", folder=folder, **settings)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    actual = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(actual) == 4
    for name in ("loss", "tokens/code", "passes/books", "loss/code", "loss/books"):
        assert actual[-1][name] == expected[-1][name]


def read_rows(size: int, groups: int, folder: str, resume: bool) -> list[int]:
    """The rows that the groups of a run read, in order."""
    trainer = trainer_of(size, groups, "padded", folder=folder, save_strategy="steps", save_steps=2)
    asked: list[int] = []

    class Watched(BlendedRows):
        def __getitems__(self, places):
            asked.extend(places)
            return super().__getitems__(places)

    trainer.train_dataset.__class__ = Watched
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    return asked


def test_any_split_reads_the_same_rows_and_resumes_at_the_same_one(world2, world4):
    folder = tempfile.mkdtemp()
    whole = read_rows(1, 1, folder, False)
    assert whole[:32] == list(range(32))
    assert read_rows(1, 1, folder, True)[:16] == list(range(16, 32))
    for world, size, groups in ((world2, 2, 1), (world2, 1, 2), (world4, 2, 2)):
        found = world.run(read_rows, size, groups, folder, True)
        assert {row for rows in found for row in rows} >= set(range(16, 32))
        assert min(row for rows in found for row in rows) == 16

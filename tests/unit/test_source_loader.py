"""Sources as loaders: streams, workers, what libraries do with the loader, and what is refused."""

from __future__ import annotations

from itertools import islice

import pytest
from torch.utils.data import DataLoader

from hf_longctx import SequenceMesh, SourcesConfig
from hf_longctx.data.sources.loader import build_source_loader
from hf_longctx.data.sources.plan import SourcePlan
from tests.sources import TWO, as_rows, draw, flat, loaders, name_of, number_of, pairs


datasets = pytest.importorskip("datasets")

WEIGHTS = {"x": 1.0, "y": 3.0}


def table(rows: list[dict]):
    return datasets.Dataset.from_list(rows)


def streams(**rows: list[dict]) -> dict:
    return {name: table(of_name).to_iterable_dataset(num_shards=3) for name, of_name in rows.items()}


# Map-style data of the `datasets` library


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_hub_data_set_gives_the_rows_of_a_list_with_any_number_of_workers(num_workers):
    tables = {name: table(rows) for name, rows in TWO.items()}
    assert draw(tables, num_workers=num_workers, swap_probability=0.5) == draw(TWO, swap_probability=0.5)


def test_the_loader_survives_accelerate_and_goes_on_after_skipped_batches():
    accelerate = pytest.importorskip("accelerate")

    def prepared():
        (loader,) = loaders(TWO)
        return accelerate.data_loader.prepare_data_loader(
            loader, num_processes=1, process_index=0, dispatch_batches=False
        )

    straight = prepared()
    epochs = []
    for epoch in range(2):
        straight.set_epoch(epoch)
        epochs.append(list(straight))
    assert epochs[0] != epochs[1] and [len(epoch) for epoch in epochs] == [len(straight)] * 2
    resumed = accelerate.skip_first_batches(prepared(), 7)
    resumed.batch_sampler.batch_sampler.set_epoch(1)  # as transformers reaches it
    assert list(resumed) == epochs[1][7:]
    assert len(resumed) == len(straight) - 7


class Words:
    """Stands for a model: `preprocess` notes what it is given."""

    def __init__(self) -> None:
        self.prompts: list = []

    def preprocess(self, texts, prompt=None, task=None):
        self.prompts.append((texts[0].split()[0], prompt))
        return {"texts": texts}


def test_sentence_transformers_collator_gets_the_name_of_the_source_for_prompts_and_labels():
    collators = pytest.importorskip("sentence_transformers.base.data_collator")
    trainers = pytest.importorskip("sentence_transformers.base.trainer")
    labelled = {name: table(pairs(name, 24, score=lambda number: number / 24)) for name in "xy"}
    # As the trainer does where losses, prompts or routes differ by source.
    named = {
        name: trainers.BaseTrainer.add_dataset_name_column(trainers.BaseTrainer, rows, dataset_name=name)
        for name, rows in labelled.items()
    }
    words = Words()
    collator = collators.BaseDataCollator(
        words.preprocess, prompts={"x": {"anchor": "of x: "}, "y": {"anchor": "y: "}}
    )
    for sources in (labelled, named):
        words.prompts.clear()
        loader = build_source_loader(sources, SequenceMesh(1, 1, 0, 0), batch_size=4, collate_fn=collator)
        for batch in loader:
            assert batch["dataset_name"] == batch["anchor_texts"][0].split()[0]
            assert batch["label"].tolist() == pytest.approx([int(t.split()[2]) / 24 for t in batch["anchor_texts"]])
        assert set(words.prompts) == {("x", "of x: "), ("x", None), ("y", "y: "), ("y", None)}
    with pytest.raises(ValueError, match="the loss, the prompts or the router of this run differ by source"):
        loaders(named, sources_per_batch=2)


# Streams


@pytest.mark.parametrize("shuffle_buffer", [0, 16])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_streams_follow_the_plan_on_all_ranks(ranks, shuffle_buffer):
    sources = streams(x=pairs("x", 60), y=pairs("y", 30))
    batches = draw(sources, 60, ranks=ranks, source_weights=WEIGHTS, shuffle_buffer=shuffle_buffer, seed=5)
    plan = SourcePlan({"x": None, "y": None}, weights=WEIGHTS, seed=5)
    for index, batch in enumerate(batches):
        assert [len(share) for share in batch] == [4] * ranks
        assert {name_of(row) for row in flat(batch)} == set(plan.draw(index).shares)
        assert len({number_of(row) for row in flat(batch)}) == 4 * ranks
        assert all(row["dataset_name"] == name_of(row) for row in flat(batch))


def test_a_stream_that_ends_begins_again_in_another_order_and_loses_nothing():
    batches = draw(streams(x=pairs("x", 30)), 15, batch_size=3, ranks=2, shuffle_buffer=30)
    drawn = [number_of(row) for batch in batches for row in flat(batch)]
    passes = [drawn[start : start + 30] for start in (0, 30, 60)]
    assert sorted(drawn) == sorted(list(range(30)) * 3)
    assert all(passes[i] != passes[j] for i, j in ((0, 1), (1, 2)))
    in_order = draw(streams(x=pairs("x", 30)), 5, batch_size=6, shuffle_buffer=0)
    assert [number_of(row) for batch in in_order for row in flat(batch)] == list(range(30))


def test_no_text_of_a_stream_is_twice_in_a_batch_of_all_ranks():
    sources = streams(x=pairs("x", 48, texts=20))
    batches = draw(sources, 36, ranks=2, deduplicate=True)
    for batch in batches:
        assert len({row["positive"] for row in flat(batch)}) == 8
    assert {number_of(row) for batch in batches for row in flat(batch)} == set(range(48))
    plain = draw(sources, 36, ranks=2)
    assert any(len({row["positive"] for row in flat(batch)}) < 8 for batch in plain)


def test_a_stream_keeps_its_budget_cap_swap_and_balance():
    rows = pairs("x", 90, tokens=lambda number: 5 + number % 20)
    config = {"tokens_per_rank": 64, "balance_by": "tokens", "source_caps": {"x": 40}, "swap_probability": 1.0}
    batches = draw(streams(x=rows), 40, ranks=2, **config)
    numbers = [[int(row["positive"].split()[2]) for row in share] for batch in batches for share in batch]
    assert {number for share in numbers for number in share} == set(range(40))
    assert all(0 < sum(5 + number % 20 for number in share) <= 64 for share in numbers)
    assert all("tokens" not in row for batch in batches for row in flat(batch))


def test_a_worker_reads_streams_as_the_others_do():
    sources = streams(x=pairs("x", 60), y=pairs("y", 30))
    for batch in draw(sources, 12, ranks=2, source_weights=WEIGHTS, num_workers=1, shuffle_buffer=8):
        assert len({(name_of(row), number_of(row)) for row in flat(batch)}) == 8
        assert len({name_of(row) for row in flat(batch)}) == 1


def test_a_stream_goes_on_after_skipped_batches():
    accelerate = pytest.importorskip("accelerate")

    def prepared():
        sources = streams(x=pairs("x", 60), y=pairs("y", 30))
        (loader, _) = loaders(sources, ranks=2, source_weights=WEIGHTS)
        return accelerate.data_loader.prepare_data_loader(
            loader, num_processes=1, process_index=0, dispatch_batches=False
        )

    straight = list(islice(prepared(), 20))
    assert list(islice(accelerate.skip_first_batches(prepared(), 7), 13)) == straight[7:]


def test_a_torch_stream_works_too():
    class Lines:
        def __iter__(self):
            yield from pairs("x", 30)

    batches = draw({"x": Lines()}, 6, ranks=2)
    assert [number_of(row) for batch in batches for row in flat(batch)][:8] == [0, 2, 4, 6, 1, 3, 5, 7]


# Refusals


class Empty:
    def __iter__(self):
        return iter(())


X = pairs("x", 40)
THREE = [{**row, "negative": "no"} for row in X]
LATE_EMPTY = [*X[:-1], {**X[-1], "positive": " "}]


@pytest.mark.parametrize(
    ("sources", "config", "message"),
    [
        ({}, {}, "`datasets` has no source"),
        ({"x": []}, {}, "source `x` has no rows: leave it out"),
        ({"x": Empty()}, {}, "the stream of source `x` has no row"),
        ({"x": X, "docs": X}, {"source_weights": {"x": 1, "doc": 1}}, "names the source `doc`, .* mean `docs`"),
        ({"x": X}, {"source_caps": {"z": 3}}, "`source_caps` names the source `z`, which is none of the 1 sources"),
        ({"x": X, "y": X}, {"source_weights": {"x": 1}}, "`source_weights` has no weight for the source `y`"),
        ({"x": iter(X), "y": iter(X)}, {}, "source `x` is a stream of unknown length"),
        ({"x": iter(X), "y": X}, {}, "source `x` is a stream and source `y` is not, .* `.to_iterable_dataset"),
        ({"x": X[:3]}, {}, "source `x` has 3 rows, but one global batch takes up to 4 of it"),
        ({"x": X}, {"source_caps": {"x": 3}}, "source `x` has 3 rows, but one global batch"),
        ({"x": X, "y": X}, {"sources_per_batch": 3}, r"`sources_per_batch` \(3\) must divide the 4 rows of a global"),
        ({"x": X, "y": THREE}, {"sources_per_batch": 2}, "the columns anchor, positive and source `y` has anchor,"),
        ({"x": THREE}, {"swap_probability": 0.5}, "exchanges the two texts of a pair, but source `x` has 3"),
        ({"x": X}, {"balance_by": "tokens"}, r"`balance_by` \('tokens'\) is no column of source `x`, which has anch"),
        (
            {"x": X},
            {"tokens_per_rank": 9},
            r"`tokens_per_rank` \(9\) needs to know .* `balance_by` is None",
        ),
        (
            {"x": X},
            {"tokens_per_rank": 9, "balance_by": "characters"},
            "is 'characters': name the column",
        ),
    ],
)
def test_sources_that_do_not_go_together_are_refused_before_the_first_batch(sources, config, message):
    with pytest.raises(ValueError, match=message):
        loaders(sources, **config)


def test_several_workers_of_a_stream_are_refused():
    with pytest.raises(ValueError, match=r"`num_workers` \(2\) would split streams between workers"):
        loaders(streams(x=X), num_workers=2)


@pytest.mark.parametrize(
    ("sources", "config", "message"),
    [
        ({"x": LATE_EMPTY}, {}, "source `x` has no text in column `positive` of row 39: filter such rows out"),
        ({"x": LATE_EMPTY}, {"deduplicate": True}, "source `x` has no text in column `positive` of row 39"),
        ({"x": [*X[:-1], {"anchor": "only"}]}, {}, "source `x` has no text in column `positive` of row 39"),
        (streams(x=LATE_EMPTY), {}, "in column `positive` of the row \"{'anchor': 'x question 39'"),
        ({"x": [{**row, "n": 20 * i} for i, row in enumerate(X)]}, {"balance_by": "n"}, "column `n` holds 0, but"),
        (
            {"x": [{**row, "n": 1 + i} for i, row in enumerate(X)]},
            {"balance_by": "n", "tokens_per_rank": 39},
            r"a row of source `x` has 40 tokens, over `tokens_per_rank` \(39\): .* It is row 39.",
        ),
        (
            {"x": [{"anchor": "same", "positive": f"{i}", "n": 1} for i in range(8)]},
            {"balance_by": "n", "tokens_per_rank": 39, "deduplicate": True, "ranks": 2},
            "source `x` has only 1 rows that share no text for the 2 ranks of global batch 0",
        ),
    ],
)
def test_rows_that_cannot_be_trained_are_refused_when_they_are_met(sources, config, message):
    with pytest.raises(ValueError, match=message):
        draw(sources, 40, **config)


def test_a_stream_that_turns_out_empty_is_refused():
    once = iter(X[:1])  # the first row tells the columns, and nothing is left
    with pytest.raises(ValueError, match="the stream of source `x` ended without a row"):
        draw({"x": once}, 2)


def test_the_loader_is_a_plain_one():
    loader = build_source_loader(TWO, SequenceMesh(1, 1, 0, 0), batch_size=4, collate_fn=as_rows)
    assert type(loader) is DataLoader and loader.batch_sampler.batch_size == 4
    assert SourcesConfig().deduplicate is False

"""Blends: proportions at every prefix, passes, the index on disk, and what cannot be blended."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_longctx import BlendedRows, PackedDataset
from hf_longctx.data.blend import blend_index, proportions
from hf_longctx.data.blend.passes import SORTED, Passes
from hf_longctx.data.blend.proportions import Proportions, assign_sources
from hf_longctx.data.packing.datasets import measure_lengths


SKEWED = {
    "one": [3.0],
    "two": [0.3, 0.7],
    "fifty by a power": (1 / np.arange(1, 51) ** 2.0).tolist(),
    "fifty by factors": np.exp(-0.4 * np.arange(50)).tolist(),
    "fifty equal": [1.0] * 50,
    "nine rare": [1.0] + [1e-6] * 9,
    "one and two hundred": [0.9] + [0.1 / 199] * 199,
}


def rows_of(name: str, count: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[number + 1] * (number % 3 + 1) for number in range(count)]})


def assigned(weights, num_rows) -> tuple[Proportions, np.ndarray]:
    owed = Proportions(np.array(weights, dtype=float), num_rows)
    return owed, np.concatenate(list(assign_sources(owed)))


def worst_error(owed: Proportions, sources: np.ndarray) -> float:
    due = owed.owed(np.arange(1, len(sources) + 1))
    return max(np.abs(np.cumsum(sources == source) - due[:, source]).max() for source in range(owed.num_sources))


def one_after_the_other(owed: Proportions) -> np.ndarray:
    """The rule, a row at a time."""
    given, every, found = np.zeros(owed.num_sources), np.arange(owed.num_sources), []
    for row in range(1, int(owed.ends[-1]) + 1):
        may = owed.when(given + owed.slack, every) <= row
        found.append(int(np.where(may, owed.when(given + 1 - owed.slack, every), np.inf).argmin()))
        given[found[-1]] += 1
    return np.array(found)


@pytest.mark.parametrize("weights", SKEWED.values(), ids=SKEWED)
def test_every_prefix_has_its_proportions_to_within_one_row(weights):
    owed, sources = assigned([weights], [30_000])
    assert len(sources) == 30_000
    assert worst_error(owed, sources) <= 1 - owed.slack + 1e-6 if len(weights) > 1 else not sources.any()


@pytest.mark.parametrize("weights", [SKEWED["fifty by factors"], SKEWED["nine rare"], [0.2, 0.3, 0.5]])
def test_stretches_side_by_side_are_one_run(weights, monkeypatch):
    """Also where the guesses are bad, so that stretches are run again."""
    monkeypatch.setattr(proportions, "_ROWS", 64)
    monkeypatch.setattr(proportions, "_STRETCHES", 16)
    expected = one_after_the_other(Proportions(np.array([weights]), [3000]))
    assert np.array_equal(assigned([weights], [3000])[1], expected)
    monkeypatch.setattr(proportions, "_guess", lambda owed, rows, earlier: np.floor(owed.owed(rows)))
    assert np.array_equal(assigned([weights], [3000])[1], expected)


def test_a_schedule_has_its_proportions_across_its_blends():
    weights = [[0.2, 0.3, 0.5, 0, 0], [0, 0.1, 0.1, 0.3, 0.5], [0.9] + [0.025] * 4]
    owed, sources = assigned(weights, [701, 1213, 999])
    assert worst_error(owed, sources) < 1
    assert np.array_equal(sources, one_after_the_other(owed))
    assert not np.isin(sources[:700], (3, 4)).any() and (sources[702:1914] == 0).sum() <= 1


@pytest.mark.parametrize("size", [1, 7, SORTED, SORTED + 1, 5000])
def test_each_pass_has_every_row_once_in_an_order_of_its_own(size):
    passes = Passes(size, 3, "books")
    orders = passes.rows(0, 3 * size).reshape(3, size)
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size == 1 or len({tuple(order) for order in orders}) > 1
    assert np.array_equal(passes.rows(size // 2, size), orders.reshape(-1)[size // 2 : size // 2 + size])
    for other in (Passes(size, 4, "books"), Passes(size, 3, "code")):
        assert size < 7 or not np.array_equal(other.rows(0, size), orders[0])


@pytest.mark.parametrize("size", [SORTED, 70_000])
def test_orders_are_spread_evenly(size):
    """Neighbours of a pass lie anywhere, and the same place of two passes has nothing in common."""
    passes = Passes(size, 0, "x")
    first, second = passes.rows(0, 2 * size).reshape(2, size)
    for one, two in ((first[1:], first[:-1]), (first, second), (first, np.arange(size))):
        cells = np.bincount(8 * (8 * one // size) + 8 * two // size, minlength=64)
        expected = len(one) / 64
        assert ((cells - expected) ** 2 / expected).sum() < 110  # chi-square of 49 to 63 degrees: 1 in 5,000


def test_a_blend_reads_the_rows_of_its_sources():
    code, books = rows_of("code", 20), rows_of("books", 6)
    blend = BlendedRows({"code": (code, 1), "books": (books, 1)}, 40)
    assert len(blend) == 40 and blend.counts() == {"code": 20, "books": 20}
    batch = blend.__getitems__([3, 0, -1])
    assert batch == [blend[3], blend[0], blend[39]]
    for place in range(40):
        name, number = blend.locate(place)
        assert blend[place] == {"code": code, "books": books}[name][number]
    passes = [number for name, number in map(blend.locate, range(40)) if name == "books"]
    assert [sorted(passes[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3
    assert passes[:6] != passes[6:12]
    with pytest.raises(IndexError, match="row 40 is outside of a blend of 40 rows"):
        blend[40]
    again = BlendedRows({"code": (list(code), 1), "books": (list(books), 1)}, 40)
    assert [again[i] for i in range(40)] == [blend[i] for i in range(40)]


def test_a_longer_blend_begins_with_the_shorter_one():
    sources = {"code": (rows_of("code", 20), 0.3), "books": (rows_of("books", 6), 0.7)}
    short, long = BlendedRows(sources, 30), BlendedRows([sources, {"books": 1.0}], [30, 20])
    assert [short.locate(i) for i in range(30)] == [long.locate(i) for i in range(30)]
    assert {long.locate(i)[0] for i in range(31, 50)} == {"books"}


def test_lengths_and_packed_rows_are_those_of_the_blend():
    blend = BlendedRows({"code": (rows_of("code", 20), 0.3), "books": (rows_of("books", 6), 0.7)}, 50)
    lengths = [len(blend[i]["input_ids"]) for i in range(50)]
    assert measure_lengths(blend).tolist() == lengths
    packed = PackedDataset(blend, 8, strategy="in_order")
    assert [row for i in range(len(packed)) for row in packed[i]] == [blend[i] for i in range(50)]


# The index on disk


def make(folder, count: int = 20, num_rows: int = 5000, seed: int = 0, weight: float = 0.3) -> BlendedRows:
    sources = {"code": (rows_of("code", count), weight), "books": (rows_of("books", 6), 0.7)}
    return BlendedRows(sources, num_rows, seed=seed, cache_dir=folder)


def test_an_index_is_built_once_mapped_and_pickled_by_name(tmp_path, monkeypatch):
    blend = make(tmp_path)
    assert isinstance(blend.index.rows, np.memmap) and blend.index.rows.dtype == np.uint32
    assert blend.index.sources.dtype == np.uint16
    memory = BlendedRows(
        {name: (data, weight) for (name, data), weight in zip(blend.datasets.items(), (0.3, 0.7))}, 5000
    )
    assert all(np.array_equal(one, two) for one, two in zip(blend.index, memory.index))
    monkeypatch.setattr(blend_index, "_build", None)  # it is there
    assert make(tmp_path).locate(4999) == blend.locate(4999)
    stored = pickle.dumps(blend)
    assert len(stored) < 5000 and pickle.loads(stored).locate(4999) == blend.locate(4999)
    assert pickle.loads(pickle.dumps(memory)).locate(7) == blend.locate(7)


def test_other_settings_have_another_index_and_no_leftovers_stay(tmp_path):
    folders = {tuple(make(tmp_path, **other).index.sources[:40]) for other in ({}, {"weight": 0.9})}
    make(tmp_path, seed=1)
    assert len(folders) == 2
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


def test_sources_that_changed_are_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="source `code` had 20 rows and has 21: a run that goes on"):
        make(tmp_path, count=21)
    other = Dataset.from_dict({"input_ids": [[9]] * 20})
    with pytest.raises(ValueError, match="source `code` has as many rows as before, but other ones"):
        BlendedRows({"code": (other, 0.3), "books": (rows_of("books", 6), 0.7)}, 5000, cache_dir=tmp_path)


class Drawn(torch.utils.data.Dataset):
    """Other rows each time, such as under a random transform."""

    def __len__(self):
        return 20

    def __getitem__(self, place):
        return {"input_ids": torch.randint(1000, (4,))}


def test_a_source_that_draws_its_rows_is_compared_by_their_number(tmp_path):
    for _ in range(2):
        assert len(BlendedRows({"drawn": (Drawn(), 1.0)}, 30, cache_dir=tmp_path)) == 30


def test_a_damaged_index_is_named(tmp_path):
    make(tmp_path)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    content = (folder / "rows.npy").read_bytes()
    for broken in (content[:-5], content[:60], b""):
        (folder / "rows.npy").write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged .*: remove that folder"):
            make(tmp_path)
    (folder / "rows.npy").write_bytes(content)
    (folder / "blend.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        make(tmp_path)
    shutil.rmtree(folder)
    assert len(make(tmp_path)) == 5000


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`cache_dir` \(.*file\) cannot hold the index.*choose a folder that this"):
        make(tmp_path / "file")


@pytest.mark.parametrize("where", ["before", "while"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, where):
    def full(*_):
        raise OSError(28, "No space left on device")

    if where == "before":
        usage = type(shutil.disk_usage(tmp_path))(1000, 999, 1)
        monkeypatch.setattr(blend_index.shutil, "disk_usage", lambda _: usage)
    else:
        monkeypatch.setattr(blend_index.os, "fsync", full)
    with pytest.raises(ValueError, match="cannot hold the index of the blend: .*; free some space"):
        make(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_index_in_a_folder_that_is_read_only_is_read(tmp_path, monkeypatch):
    make(tmp_path)

    def no(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(blend_index.Path, "mkdir", no)
    assert len(make(tmp_path)) == 5000
    with pytest.raises(ValueError, match="Permission denied; choose a folder that this process may write"):
        make(tmp_path, seed=9)


def _build_and_report(folder, queue, barrier):
    built = []
    original = blend_index._build
    blend_index._build = lambda *args: (built.append(1), original(*args))
    barrier.wait()
    queue.put((len(built) or len(make(folder, num_rows=200_000)) and len(built), os.getpid()))


def test_of_processes_that_start_together_one_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(3)
    workers = [context.Process(target=_build_and_report, args=(tmp_path, queue, barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60)[0] for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(found) == [0, 0, 1]
    facts = json.loads(next(tmp_path.glob("*/blend.json")).read_text())
    assert facts["sources"]["code"]["rows"] == 20


# What cannot be blended


@pytest.mark.parametrize("weight", [-1.0, 0, float("nan"), float("inf"), True, "0.3", None, np.float64("nan")])
def test_weights_that_are_none_are_refused(weight):
    with pytest.raises(ValueError, match=r"the weight of source `code` \(.*\) must be a finite number above 0"):
        BlendedRows({"code": (rows_of("code", 3), weight)}, 10)


@pytest.mark.parametrize(
    ("sources", "num_rows", "message"),
    [
        ({}, 10, "has no source|must map names"),
        ([], 10, "must map names"),
        ("code", 10, "must map names"),
        ([{}], [10], "blend 0 of `sources` has no source"),
        ({"code": ([], 1.0)}, 10, "source `code` has no rows"),
        ({"code": (5, 1.0)}, 10, "source `code` is a `int`"),
        ({"code": 1.0}, 10, "has a weight and no data set"),
        ([{"code": ([1], 1.0)}, {"code": ([2], 1.0)}], [5, 5], "stands for two data sets"),
        ({"code": ([1], 1.0)}, 0, "must be a positive number of rows"),
        ({"code": ([1], 1.0)}, 2.5, "must be a positive number of rows"),
        ({"code": ([1], 1.0)}, [5, 5], "has 2 numbers for 1 blends"),
    ],
)
def test_blends_that_are_none_are_refused(sources, num_rows, message):
    with pytest.raises(ValueError, match=message):
        BlendedRows(sources, num_rows)


def test_other_seeds_streams_and_too_many_sources_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"`seed` \('x'\) must be a whole number"):
        BlendedRows({"code": ([1], 1.0)}, 3, seed="x")
    with pytest.raises(NotImplementedError, match="source `code` is a stream"):
        BlendedRows({"code": (rows_of("code", 3).to_iterable_dataset(), 1.0)}, 10)
    monkeypatch.setattr("hf_longctx.data.blend.blend_settings.MOST_SOURCES", 1)
    with pytest.raises(ValueError, match="`sources` has 2 sources, but an index counts them with 16 bits"):
        BlendedRows({"a": ([1], 1.0), "b": ([1], 1.0)}, 10)

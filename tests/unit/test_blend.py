"""Blends: passes, the index on disk, and what cannot be blended."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value, concatenate_datasets, load_from_disk

from hf_longctx import BlendedRows, PackedDataset
from hf_longctx.data.blend import blend_index, source_content
from hf_longctx.data.blend.passes import SORTED, Passes
from hf_longctx.data.blend.source_content import MOST_READ
from hf_longctx.data.packing.datasets import measure_lengths


def rows_of(name: str, count: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[number + 1] * (number % 3 + 1) for number in range(count)]})


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


@pytest.mark.parametrize("kind", ["list", "arrow", "text"])
def test_one_changed_row_of_a_source_is_noticed(tmp_path, kind):
    """Whichever it is, also one of which no row is read by number."""
    count = MOST_READ if kind == "list" else 3000
    texts = ["".join(str(number)) for number in range(count)]
    rows = [{"text": texts[i]} if kind == "text" else {"input_ids": [i, i]} for i in range(count)]
    held = list if kind == "list" else Dataset.from_list
    BlendedRows({"code": (held(rows), 1.0)}, 50, cache_dir=tmp_path)
    BlendedRows({"code": (held(rows), 1.0)}, 50, cache_dir=tmp_path)
    rows[777] = {"text": "778"} if kind == "text" else {"input_ids": [778, 777]}
    with pytest.raises(ValueError, match="source `code` has as many rows as before, but other ones"):
        BlendedRows({"code": (held(rows), 1.0)}, 50, cache_dir=tmp_path)


def test_the_same_rows_in_another_container_are_the_same_source(tmp_path, monkeypatch):
    """Of another file, in another order of rows below, in other chunks and of smaller integers."""
    data = rows_of("code", 3000)
    data.save_to_disk(str(tmp_path / "disk"))
    turned = Dataset.from_list([data[i] for i in reversed(range(3000))]).select(list(reversed(range(3000))))
    chunks = concatenate_datasets([data.select(range(1100)), data.select(range(1100, 3000))])
    small = data.cast_column("input_ids", List(Value("int32")))
    build = lambda rows: BlendedRows({"code": (rows, 1.0)}, 50, cache_dir=tmp_path)
    build(load_from_disk(str(tmp_path / "disk")))
    for same in (data, turned, chunks, small, data.with_format("torch")):
        build(same)
    with pytest.raises(ValueError, match="but other ones"):
        build(turned.flatten_indices().select(list(range(2999, -1, -1))))
    doubled = data.with_transform(lambda batch: {"input_ids": [2 * ids for ids in batch["input_ids"]]})
    with pytest.raises(ValueError, match="but other ones"):
        build(doubled)


def test_of_a_large_source_the_files_are_compared_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(source_content, "MOST_BYTES", 10)
    monkeypatch.setattr("hf_longctx.data.blend.source_content.MOST_READ", 100)
    data = rows_of("code", 3000)
    for part in ("one", "two"):
        data.save_to_disk(str(tmp_path / part))
    build = lambda part: BlendedRows({"code": (load_from_disk(str(tmp_path / part)), 1.0)}, 50, cache_dir=tmp_path)
    build("one")
    with monkeypatch.context() as patched:
        patched.setattr(source_content, "_text", None)  # nothing is read where the files are the same
        build("one")
    assert not caplog.records
    build("two")
    assert "source `code` comes from other files than when the index" in caplog.text


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


@pytest.mark.parametrize(
    "weight", [-1.0, 0, 10**400, float("nan"), float("inf"), True, "0.3", None, np.float64("nan")]
)
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
        ({"code": ([1], 1.0)}, 10**30, "is more than an index can have, 549,755,813,888 rows"),
        ({1: ([1], 1.0), "1": ([2], 1.0)}, 5, "source 1 of blend 0 is no text"),
        ({"": ([1], 1.0)}, 5, "source '' of blend 0 is no text, or an empty one"),
        ({"a": ([1], 1e308), "b": ([1], 1e308)}, 5, "are too large to be added up"),
        ({"a": ([1], 1e-320), "b": ([1], 1.0)}, 5, "too far apart"),
        ({"code": ([1], 1.0)}, [5, 5], "has 2 numbers for 1 blends"),
    ],
)
def test_blends_that_are_none_are_refused(sources, num_rows, message):
    with pytest.raises(ValueError, match=message):
        BlendedRows(sources, num_rows)


@pytest.mark.parametrize("folder", [5, True, [], "", b"blend"])
def test_folders_that_are_none_are_refused(folder):
    with pytest.raises(ValueError, match=r"`cache_dir` \(.*\) must name a folder, or be left out"):
        BlendedRows({"code": ([1], 1.0)}, 3, cache_dir=folder)


@pytest.mark.filterwarnings("error")
def test_weights_of_any_size_are_blended():
    """Some so small that a blend has no row for them."""
    for large, small in ((1e308, 1.0), (1e-320, 1e-320), (1.0, 1e-300), (10**300, 1)):
        counts = BlendedRows({"a": ([1], large), "b": ([2], small)}, 300).counts()
        assert counts == ({"a": 150, "b": 150} if large == small else {"a": 300, "b": 0})


def test_rows_are_read_by_number():
    blend = BlendedRows({"code": ([1, 2], 1.0)}, 4)
    assert blend[np.int64(1)] == blend[torch.tensor(1)] == blend[1] and len(list(blend)) == 4
    for position in (1.5, "1", None, slice(0, 2), [0, 1]):
        with pytest.raises(ValueError, match="a blend is read by the number of a row, and not by"):
            blend[position]
    for num_rows in (-1, 2.5, "x"):
        with pytest.raises(ValueError, match=r"`num_rows` \(.*\) must be a number of rows of the blend"):
            blend.counts(num_rows)


def test_other_seeds_streams_and_too_many_sources_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"`seed` \('x'\) must be a whole number"):
        BlendedRows({"code": ([1], 1.0)}, 3, seed="x")
    with pytest.raises(NotImplementedError, match="source `code` is a stream"):
        BlendedRows({"code": (rows_of("code", 3).to_iterable_dataset(), 1.0)}, 10)
    monkeypatch.setattr("hf_longctx.data.blend.blend_settings.MOST_SOURCES", 1)
    with pytest.raises(ValueError, match="`sources` has 2 sources, but an index counts them with 16 bits"):
        BlendedRows({"a": ([1], 1.0), "b": ([1], 1.0)}, 10)

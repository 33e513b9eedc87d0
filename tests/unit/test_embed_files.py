"""Files of pairs: only regular ones inside their folder are read, bad rows are named, and memory is not filled."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc

import pytest
from datasets import Dataset

from hf_longctx.tasks import embed_files, embed_sources


PAIR = {"anchor": "a", "positive": "b"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows_of(place, **options):
    args = embed_sources.SourceArguments(sources={"pairs": str(place)}, **options)
    present, absent = embed_sources.open_sources(embed_sources.list_sources(args), args)
    assert not absent
    return list(present["pairs"])


def write(place, rows):
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(place.parent / "plain.parquet")
        (place.parent / "plain.parquet").rename(place)
    elif place.suffix == ".csv":
        Dataset.from_list(rows).to_csv(place)
    else:
        lines = "\n".join(map(json.dumps, rows)).encode()
        place.write_bytes(gzip.compress(lines) if place.suffix == ".gz" else lines)
    return place


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a[1].jsonl", "a[1].jsonl.gz", "x::y.parquet", "[b]/c.csv", "folder"])
def test_a_file_of_any_name_is_read(tmp_path, name, streaming):
    place = tmp_path / "data" / name
    if name == "folder":
        write(place / "a[1].jsonl", [PAIR])
        write(place / "test.jsonl", [{"anchor": "of another split", "positive": "b"}])
        os.mkfifo(place / "pipe.jsonl")
        (place / "secret.jsonl").symlink_to(write(tmp_path / "secret.jsonl", [PAIR]))
        write(place / "train.jsonl", [PAIR])
        assert rows_of(place, streaming=streaming) == [PAIR]  # `datasets` takes `train` where there is a `test`
    else:
        write(place, [PAIR, PAIR])
        assert rows_of(place, streaming=streaming) == [PAIR, PAIR]


BAD = {"null": None, "the number 5": 5, "the boolean true": True, "an object": {"a": 1}}
NAMES = ("rows.jsonl", "rows.jsonl.gz", "folder/rows.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "said", "value"),
    [(name, *pair) for name in NAMES for pair in BAD.items()]
    + [(NAMES[0], "null", ["a", None])]  # one of several negatives
    + [("rows.parquet", *pair) for pair in list(BAD.items())[:3]],
)
def test_a_bad_value_is_named_by_file_line_and_column(tmp_path, name, said, value, streaming):
    is_table = name.endswith(".parquet")  # whose columns have one type
    write(tmp_path / name, [{**PAIR, "positive": value}] if is_table else [PAIR, {**PAIR, "positive": value}])
    place = "row 0" if is_table else "line 2"
    with pytest.raises(ValueError, match=rf"rows[^`]*`, {place}: column `positive` holds {said}"):
        rows_of(tmp_path / name.split("/")[0], streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"5", "line 2 is the number 5, and neither an object nor a list of texts"),
        (b'{"query": "a", "pos": null}', "line 2 has null under `pos`, and not a list"),
        (b'{"query": "a", "pos": []}', "line 2 has a list under `pos`"),
        (b'{"pos": ["a"]}', "line 2 has no key `query`, only pos"),
        (b'{"set": "ab"}', "line 2 has a text under `set`, and not a list"),
        (b'["a", 5]', "line 2: column `positive` holds the number 5"),
        (b'["a"]', "line 2 has no column `positive`, only anchor"),
        (b'{"anchor": "a"', "line 2 is no JSON"),
        (b'["a", "caf\xe9"]', "not UTF-8: byte 36, in line 2, is 0xe9; convert it"),
        (b'["a", "\\ud800"]', "line 2: column `positive` holds a text that no UTF-8 can hold"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, words, streaming):
    (tmp_path / "rows.jsonl").write_bytes(b'{"query":"q","pos":["p"]}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl`.*{words}"):
        rows_of(tmp_path / "rows.jsonl", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_may_hold_anything(tmp_path, streaming):
    rows = [{"id": 1, **PAIR, "label": 1}, {"id": "x", **PAIR, "label": 0.5}]
    write(tmp_path / "rows.jsonl", rows)
    options = {"source_columns": {"pairs": ["anchor", "positive"]}, "streaming": streaming}
    assert rows_of(tmp_path / "rows.jsonl", **options) == [{**PAIR, "label": 1}, {**PAIR, "label": 0.5}]
    with pytest.raises(
        ValueError, match="line 1: column `id` holds the number 1, and a text is needed.*`source_columns`"
    ):
        rows_of(tmp_path / "rows.jsonl", streaming=streaming)


def test_columns_of_tables_that_are_no_texts_are_named(tmp_path):
    write(tmp_path / "rows.csv", [{"id": 1, **PAIR}])
    with pytest.raises(
        ValueError, match="rows.csv`: column `id` is read as int64, and a text is needed: name the col"
    ):
        rows_of(tmp_path / "rows.csv")
    (tmp_path / "latin.csv").write_bytes(b"anchor,positive\na,caf\xe9\n")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="latin.csv` is not UTF-8: byte 21, in line 2, is 0xe9"):
            rows_of(tmp_path / "latin.csv", streaming=streaming)


def test_mixed_labels_are_told(tmp_path):
    write(tmp_path / "rows.jsonl", [{**PAIR, "label": 1}, {**PAIR, "label": "x"}])
    with pytest.raises(ValueError, match="rows.jsonl` mixes types in one column"):
        rows_of(tmp_path / "rows.jsonl")


def test_empty_and_cut_files_are_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="rows.jsonl` has no rows"):
        rows_of(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-500])
    with pytest.raises(ValueError, match="rows.jsonl.gz` is cut off or damaged"):
        rows_of(tmp_path / "rows.jsonl.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty` has no file to read .it is empty"):
        rows_of(tmp_path / "empty")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("about")
    (tmp_path / "folder" / "rows.jsonl").write_bytes(b'{"anchor": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="source `pairs`: the texts in `.*folder` are not UTF-8"):
        rows_of(tmp_path / "folder")


def test_a_source_that_datasets_cannot_read_is_told(monkeypatch):
    def fail(*_, **__):
        raise EOFError("the connection ended")

    monkeypatch.setattr(embed_sources, "load_dataset", fail)
    args = embed_sources.SourceArguments(sources={"pairs": "owner/pairs"})
    with pytest.raises(ValueError, match="source `pairs`: `owner/pairs` cannot be read .*: check its files"):
        embed_sources.open_source("pairs", "owner/pairs", args)


def test_what_is_no_file_is_absent_with_its_reason(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    write(tmp_path / "good.jsonl", [PAIR])
    names = {name: str(tmp_path / f"{name}.jsonl") for name in ("pipe", "zero", "broken", "good")}
    args = embed_sources.SourceArguments(sources=names)
    present, absent = embed_sources.open_sources(embed_sources.list_sources(args), args)
    assert list(present) == ["good"]
    for name, kind in (("pipe", "a named pipe"), ("zero", "a device"), ("broken", "a broken link")):
        assert f"is {kind} and no regular file" in absent[name]


@pytest.mark.parametrize("setting", ["sources_folder", "sources_at"])
def test_a_name_that_leads_out_of_its_folder_is_absent(tmp_path, setting):
    write(tmp_path / "secret.jsonl", [PAIR])
    write(tmp_path / "data" / "good.jsonl", [PAIR])
    (tmp_path / "data" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    config = [{"name": name, "lines": 1, "weight": 1} for name in ("good.jsonl", "link.jsonl", "../secret.jsonl")]
    (tmp_path / "config.json").write_text(json.dumps(config))
    where = str(tmp_path / "data") if setting == "sources_folder" else {"": f"{tmp_path}/data/"}
    args = embed_sources.SourceArguments(sources_config=str(tmp_path / "config.json"), **{setting: where})
    present, absent = embed_sources.open_sources(embed_sources.list_sources(args), args)
    assert list(present) == ["good.jsonl"]
    assert all("leads out of" in absent[name] for name in ("link.jsonl", "../secret.jsonl"))


def test_a_folder_with_a_card_is_not_read_over_links_that_lead_out(tmp_path):
    write(tmp_path / "data" / "rows.jsonl", [PAIR])
    (tmp_path / "data" / "README.md").write_text("about")
    assert rows_of(tmp_path / "data") == [PAIR]
    (tmp_path / "data" / "link.jsonl").symlink_to(write(tmp_path / "secret.jsonl", [PAIR]))
    with pytest.raises(ValueError, match="data` holds 1 links that lead out of it, which `datasets` would follow"):
        rows_of(tmp_path / "data")


def test_settings_that_are_no_mapping_are_told():
    for value in ("[1]", ["a"], '{"a": 1}'):
        with pytest.raises(ValueError, match="`sources` .* must map names to texts"):
            embed_sources.SourceArguments(sources=value)
    with pytest.raises(ValueError, match="`source_columns` .* must map names to lists of columns"):
        embed_sources.SourceArguments(source_columns={"a": "b"})


def test_rows_in_memory_are_python_objects_a_chunk_at_a_time(tmp_path):
    def peak(num_rows):
        with open(tmp_path / "rows.jsonl", "w") as file:
            for number in range(num_rows):
                file.write(f'["question {number}", "{"x" * 200}"]\n')
        tracemalloc.start()
        rows = embed_files.open_file(str(tmp_path / "rows.jsonl"), None, None, False)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(rows) == num_rows
        return used

    few = peak(2 * embed_files.CHUNK)
    assert peak(12 * embed_files.CHUNK) < 1.5 * few

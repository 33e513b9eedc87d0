"""What a folder that somebody else filled may hold: regular files inside it are opened, nothing else; bad rows are
named."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import socket
import tracemalloc
from pathlib import Path

import pyarrow.parquet
import pytest
from datasets import Dataset, IterableDataset

from hf_longctx.data import data_files, text_files
from hf_longctx.data.documents import column_names, load_documents, split_into_rows
from hf_longctx.data.files import PIECE, is_inside, open_regular, read_json

from .test_documents import CharacterTokenizer


LATIN = "caf\xe9".encode("latin-1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("a secret")
    (tmp_path / "outside" / "secret.jsonl").write_text('{"text": "a secret"}\n')
    return tmp_path / "outside"


def spoil(folder: Path, outside: Path, ending: str) -> None:
    """Everything in a folder that is no regular file of it."""
    os.mkfifo(folder / f"pipe.{ending}")
    (folder / f"zero.{ending}").symlink_to("/dev/zero")
    (folder / f"out.{ending}").symlink_to(outside / f"secret.{ending}")
    (folder / f"broken.{ending}").symlink_to(folder / "nowhere")
    (folder / f"loop.{ending}").symlink_to(f"loop.{ending}")
    (folder / "folder").symlink_to(outside)
    with socket.socket(socket.AF_UNIX) as end:
        here = os.getcwd()
        os.chdir(folder)  # the address of a socket is short
        end.bind(f"s.{ending}")
        os.chdir(here)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
@pytest.mark.parametrize("form", ["folder", "glob"])
def test_only_regular_files_inside_the_folder_are_read(tmp_path, outside, caplog, ending, form, streaming):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / f"a.{ending}").write_text("good" if ending == "txt" else '{"text": "good"}\n')
    (folder / f"link.{ending}").symlink_to(f"a.{ending}")  # inside: read
    spoil(folder, outside, ending)
    name = folder if form == "folder" else folder / f"*.{ending}"
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        rows = load_documents(str(name), streaming=streaming)
    assert [row["text"] for row in rows] == ["good", "good"]
    (line,) = [record.message for record in caplog.records if "skipped" in record.message]
    assert "2 broken link" in line and "1 link out of the folder" in line
    assert "1 named pipe" in line and "1 device" in line and "1 socket" in line


def test_a_folder_behind_a_link_in_a_pattern_is_outside(tmp_path, outside):
    (tmp_path / "data" / "b").mkdir(parents=True)
    (tmp_path / "data" / "a").symlink_to(outside)
    (tmp_path / "data" / "b" / "x.txt").write_text("good")
    assert load_documents(str(tmp_path / "data" / "*" / "*.txt"))["text"] == ["good"]
    with pytest.raises(ValueError, match="matches no file that may be read, but 1 link out of the folder"):
        load_documents(str(tmp_path / "data" / "[a]" / "*.txt"))


def test_a_root_that_is_a_link_and_a_snapshot_of_the_hubs_cache_are_read(tmp_path, outside):
    (tmp_path / "link").symlink_to(outside)
    assert load_documents(str(tmp_path / "link"), extensions=[".txt"])["text"] == ["a secret"]
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (tmp_path / "datasets--a--b" / "blobs" / "123").write_text('{"text": "from the Hub"}\n')
    (snapshot / "rows.jsonl").symlink_to("../../blobs/123")
    (snapshot / "out.jsonl").symlink_to(outside / "secret.jsonl")
    assert load_documents(str(snapshot))["text"] == ["from the Hub"]
    assert not is_inside(snapshot / "out.jsonl", snapshot)


def test_what_is_named_and_no_file_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    for name, kind in ((tmp_path / "pipe.jsonl", "a named pipe"), (tmp_path / "broken.jsonl", "a broken link")):
        with pytest.raises(ValueError, match=f"is {kind} and no regular file: give a file or a folder"):
            load_documents(str(name))
    with pytest.raises(ValueError, match="`/dev/zero` is a device and no regular file"):
        open_regular("/dev/zero")
    with pytest.raises(ValueError, match=r"gone` cannot be read \(No such file or directory\): check its name"):
        open_regular(tmp_path / "gone")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "q?*.jsonl", "a[1].jsonl.gz", "x::y.jsonl", "[b]/a.parquet", b"caf\xe9.jsonl", "ü {1}.json"]
)
def test_names_are_no_patterns(tmp_path, name, streaming):
    file = tmp_path / "data" / os.fsdecode(name)
    file.parent.mkdir(parents=True)
    if file.suffix == ".parquet":
        Dataset.from_dict({"text": ["a"]}).to_parquet(file)
    else:
        data = b'{"text": "a"}\n'
        file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    assert [row["text"] for row in load_documents(str(file), streaming=streaming)] == ["a"]
    if file.suffix not in (".parquet", ".gz"):
        file.write_text('{"text": "another one"}\n')  # an edited file is read again
        assert [row["text"] for row in load_documents(str(file), streaming=streaming)] == ["another one"]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_any_name_are_read(tmp_path, streaming):
    for name in (b"a[1].txt", b"caf\xe9.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("text")
    rows = load_documents(str(tmp_path), streaming=streaming)
    assert [row["path"] for row in rows] == ["a[1].txt", "caf\\xe9.txt"]


CHAT = [{"role": "user", "content": "hello"}]
BAD_VALUES = [
    (None, "null"),
    (5, "the number 5"),
    (True, "the boolean true"),
    (["a"], "a list"),
    ({"a": 1}, "an object"),
]
BAD_VALUES = [
    *BAD_VALUES,
    (CHAT, "a conversation .a list of messages., and a document is a text: move it to a column"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "json", "gz", "bz2", "xz", "parquet", "folder"])
@pytest.mark.parametrize(("value", "said"), BAD_VALUES, ids=[said[:9] for _, said in BAD_VALUES])
def test_a_row_without_a_text_is_named_by_file_line_and_column(tmp_path, form, value, said, streaming):
    rows = [{"text": "one"}, {"text": "two"}, {"text": value}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    name, place = tmp_path / f"rows.{form}", "line 3"
    if form == "parquet":
        rows, place = ([{"text": "one"}, {"text": None}], "row 1") if value is None else ([{"text": value}], "row 0")
        Dataset.from_list(rows).to_parquet(name)
    elif form == "json":
        name.write_text(json.dumps(rows))
        place = "entry 2"
    elif form == "folder":
        name.mkdir()
        (name / "a.jsonl").write_text('{"text": "zero"}\n')
        (name / "rows.jsonl").write_bytes(lines)
    else:
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(form, bytes)
        name = name if form == "jsonl" else tmp_path / f"rows.jsonl.{form}"
        name.write_bytes(pack(lines))
    with pytest.raises(ValueError, match=rf"rows[^`]*`, {place}: column `text` holds {said}"):
        list(load_documents(str(name), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has no rows: it is empty"),
        (b"\n \n", "has no row"),
        (b'{"text": "a"}\n{"text"\n', "line 2 is no JSON .Expecting ':' delimiter"),
        (b'{"text": "a"}\n7\n', "line 2 is the number 7, and not a JSON object"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: column `text` holds a text that no UTF-8 can hold"),
        (b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no column `text`, only body"),
        (
            b'{"text": "a"}\n{"text": "' + LATIN + b'"}\n',
            "not UTF-8: byte 27, in line 2, is 0xe9; convert it, for exa",
        ),
        ('{"text": "a"}\n'.encode("utf-16"), "not UTF-8: byte 0 is 0xff; convert it, .* `iconv -f UTF-16 -t UTF-8`"),
        (b"\0" * 100, "is binary: byte 0 is 0x00"),
    ],
    ids=["empty", "blank", "cut", "scalar", "surrogate", "missing", "latin", "utf16", "binary"],
)
def test_a_broken_file_of_lines_is_told_in_words(tmp_path, data, words, streaming):
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        list(load_documents(str(tmp_path / "rows.jsonl"), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["gz", "parquet"])
def test_a_cut_or_foreign_file_is_told(tmp_path, kind, streaming):
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(5000))
    if kind == "gz":
        name, words = tmp_path / "rows.jsonl.gz", "is cut off or damaged"
        name.write_bytes(gzip.compress(lines)[:-2000])
    else:
        name, words = tmp_path / "rows.parquet", "is no parquet file, or damaged"
        name.write_bytes(b"PAR1" + lines)
    with pytest.raises(ValueError, match=words):
        list(load_documents(str(name), streaming=streaming))


def test_a_column_of_dates_is_told_where_datasets_would_make_times_of_them(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "2024-01-01"}\n')
    with pytest.raises(ValueError, match="reads column `text` as timestamp.s., and a document is a text: write other"):
        load_documents(str(tmp_path / "rows.jsonl"))
    assert list(load_documents(str(tmp_path / "rows.jsonl"), streaming=True)) == [{"text": "2024-01-01"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_json_over_several_lines_is_read(tmp_path, streaming):
    rows = [{"text": "a"}, {"text": "b"}]
    for content, texts in ((rows, ["a", "b"]), (rows[0], ["a"])):
        (tmp_path / "rows.json").write_text(json.dumps(content, indent=1))
        assert [row["text"] for row in load_documents(str(tmp_path / "rows.json"), streaming=streaming)] == texts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_parquet_that_is_not_utf8_is_named(tmp_path, streaming):
    texts = pyarrow.array([b"a", b"b", LATIN]).view("string")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet`, row 2 is not UTF-8 .*: write its texts as UTF-8"):
        list(load_documents(str(tmp_path / "rows.parquet"), streaming=streaming))


def test_an_empty_file_next_to_others_is_skipped_and_counted(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        assert load_documents(str(tmp_path))["text"] == ["b"]
    assert "skipped 1 of 2 files" in caplog.text and "1 empty file" in caplog.text


def test_a_text_next_to_columns_that_replace_it_is_not_checked(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CHAT, "text": None}) + "\n")
    name = str(tmp_path / "rows.jsonl")
    assert len(load_documents(name, or_columns=("messages",))) == 1
    assert len(list(load_documents(name, or_columns=("messages",), streaming=True))) == 1
    with pytest.raises(ValueError, match="line 1: column `text` holds null"):
        load_documents(name, or_columns=("length",))


def test_an_undecodable_document_names_byte_and_remedy(tmp_path, caplog):
    (tmp_path / "latin.txt").write_bytes(LATIN)
    said = "latin.txt` is not UTF-8: byte 3 is 0xe9; convert it, for example with `iconv -f LATIN1 -t UTF-8`"
    with pytest.raises(ValueError, match=said):
        load_documents(str(tmp_path / "latin.txt"))
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        assert len(load_documents(str(tmp_path))) == 1
    assert "skipped 2 of 3 files" in caplog.text and "2 not UTF-8 (`latin.txt` is not UTF-8: byte 3" in caplog.text


def test_a_binary_file_is_dropped_after_its_first_piece_and_a_text_takes_its_size(tmp_path):
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(1 << 40)  # a terabyte of zeros that takes no room
    assert text_files.read_document(str(tmp_path / "huge.txt"), "huge.txt", 1 << 40) == (None, "`huge.txt` is binary.")
    (tmp_path / "long.txt").write_bytes(b"e" * (3 * PIECE - 1) + "\xfc".encode())  # a letter over a border
    text, _ = text_files.read_document(str(tmp_path / "long.txt"), "long.txt", 1 << 40)
    assert len(text) == 3 * PIECE and text.endswith("e\xfc")
    assert text_files.read_document(str(tmp_path / "long.txt"), "long.txt", 5) == ("eeeee", None)
    (tmp_path / "late.txt").write_bytes(b"e" * (2 * PIECE - 1) + b"\xc3\xc3")
    _, fault = text_files.read_document(str(tmp_path / "late.txt"), "late.txt", 1 << 40)
    assert f"byte {2 * PIECE - 1} is 0xc3" in fault
    _, fault = text_files.read_document(str(tmp_path / "late.txt"), "late.txt", 2 * PIECE)
    assert f"byte {2 * PIECE - 1} is 0xc3" in fault  # half a letter at the end


def test_a_fault_at_the_end_of_a_big_file_is_found_in_pieces(tmp_path):
    with open(tmp_path / "rows.jsonl", "wb") as file:
        for _ in range(16):
            file.write(b'{"text": "%s"}\n' % (b"x" * PIECE))
        file.write(b'{"text": null}\n')
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 17: column `text` holds null"):
        data_files.find_fault("json", [tmp_path / "rows.jsonl"], "text")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * PIECE


def test_rows_of_a_data_set_without_a_text_are_named():
    rows = Dataset.from_dict({"text": ["a", None]})
    for part in (rows, rows.to_iterable_dataset()):
        with pytest.raises(
            ValueError, match="row 1 of the data set: column `text` holds null, and a document is a tex"
        ):
            list(split_into_rows(part, CharacterTokenizer(), 4))
    with pytest.raises(ValueError, match="the stream of documents has no row"):
        column_names(IterableDataset.from_generator(lambda: iter(())))


def test_a_stream_of_files_has_no_other_split(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="`split` .'test'. must be 'train' for .*: a stream of files has no other"):
        load_documents(str(tmp_path / "rows.jsonl"), split="test", streaming=True)
    assert load_documents(str(tmp_path / "rows.jsonl"), split="train[:1]")["text"] == ["a"]


def test_json_of_a_user_is_read_or_told(tmp_path):
    file = tmp_path / "config.json"
    for data, words in (
        (b"{", "config.json` is no JSON .Expecting property name"),
        (b"[1]", "config.json` holds a list, and not a JSON object"),
        (b'"' + LATIN + b'"', "config.json` is not UTF-8: byte 4 is 0xe9"),
        (b"[" * 100_000, "config.json` is no JSON"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            read_json(file)
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1}

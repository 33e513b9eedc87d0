"""Documents of every form become the right rows, and wrong input says what to do."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from hf_longctx.data.documents import load_documents, split_into_rows


class CharacterTokenizer:
    """One token a character; 0 ends a document."""

    eos_token_id = 0

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "documents"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "z.py").write_text("print('z')\n")
    (root / "b" / "a.md").write_text("# Title\n\nsecond line\n", encoding="utf-8")
    (root / "a.txt").write_text("\ufefffirst", encoding="utf-8")
    (root / ".git" / "hidden.txt").write_text("hidden")
    (root / "picture.png").write_bytes(b"\x89PNG")
    return root


def rows_of(texts: list[str], row_tokens: int, **options) -> list[str]:
    rows = split_into_rows(Dataset.from_dict({"text": texts}), CharacterTokenizer(), row_tokens, **options)
    assert rows["input_ids"] == rows["labels"]
    return ["".join(chr(token or ord("|")) for token in row) for row in rows["input_ids"]]


def test_a_folder_gives_one_whole_file_a_row_in_order_of_paths(folder):
    dataset = load_documents(str(folder))
    assert dataset["path"] == ["a.txt", "z.py", "b/a.md"]
    assert dataset["text"] == ["first", "print('z')\n", "# Title\n\nsecond line\n"]


def test_a_streamed_folder_gives_the_same_rows(folder):
    dataset = load_documents(str(folder), streaming=True)
    assert isinstance(dataset, IterableDataset)
    assert [row["path"] for row in dataset] == ["a.txt", "z.py", "b/a.md"]


def test_binary_empty_and_undecodable_files_are_skipped_and_counted(folder, caplog):
    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with caplog.at_level(logging.WARNING, "hf_longctx"):
        assert len(load_documents(str(folder))) == 3
    assert "skipped 3 of 6 files" in caplog.text


def test_an_edited_file_is_read_again(folder):
    load_documents(str(folder))
    (folder / "a.txt").write_text("another text")
    assert load_documents(str(folder))["text"][0] == "another text"


def test_extensions_choose_what_counts_as_a_document(folder):
    (folder / "notes.log").write_text("a log")
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n')
    assert load_documents(str(folder), extensions=[".log"])["path"] == ["notes.log"]


def test_a_glob_and_a_single_file_are_read(folder):
    assert load_documents(str(folder / "**" / "*.md"))["text"] == ["# Title\n\nsecond line\n"]
    assert load_documents(str(folder / "a.txt"))["path"] == ["a.txt"]


@pytest.mark.parametrize("form", ["file", "folder", "glob", "gzip", "parquet"])
def test_data_files_are_read_by_datasets(tmp_path, form):
    root = tmp_path / "data"
    root.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    if form == "parquet":
        Dataset.from_dict({"text": ["one", "two"]}).to_parquet(root / "rows.parquet")
    elif form == "gzip":
        (root / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    else:
        (root / "rows.jsonl").write_text(lines)
    (root / "README.md").write_text("about the data")  # beside data it is no document
    name = {"file": root / "rows.jsonl", "glob": root / "*.jsonl"}.get(form, root)
    assert load_documents(str(name))["text"] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./missing", ["`./missing`", "does not exist", "`owner/name`"]),
        ("missing.jsonl", ["`missing.jsonl`", "does not exist"]),
        ("missing/*.md", ["`missing/*.md`", "matches no file"]),
    ],
)
def test_what_is_not_there_is_said(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_documents(name)
    assert all(word in str(error.value) for word in words)


def test_a_name_that_the_hub_does_not_give_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="`nobody/nothing` is neither a file or folder here nor a dataset"):
        load_documents("nobody/nothing")


def test_a_folder_without_documents_names_the_extensions(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"found \.png, looked for \.txt \.md .*\.parquet"):
        load_documents(str(tmp_path))


def test_a_file_of_unknown_extension_is_refused(tmp_path):
    (tmp_path / "song.mp3").write_bytes(b"ID3")
    with pytest.raises(ValueError, match=r"song\.mp3` holds no document: found \.mp3"):
        load_documents(str(tmp_path / "song.mp3"))


def test_a_folder_of_only_binary_files_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\0")
    with pytest.raises(ValueError, match="all 1 files of .* are binary, empty or not UTF-8"):
        load_documents(str(tmp_path))


def test_documents_beside_data_are_refused(folder):
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n')
    with pytest.raises(ValueError, match=r"1 data files \(such as `rows.jsonl`\).*next to 3 documents: give a glob"):
        load_documents(str(folder))


def test_a_missing_text_column_names_the_columns(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"title": "a", "body": "b"}\n')
    with pytest.raises(ValueError, match="no column `text`, only title, body"):
        load_documents(str(tmp_path / "rows.jsonl"))
    assert load_documents(str(tmp_path / "rows.jsonl"), text_field="body")["body"] == ["b"]


def test_a_data_set_of_the_hub_without_the_column_names_its_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_dict({"body": ["a"]}))
    with pytest.raises(ValueError, match="`owner/rows` has no column `text`, only body"):
        load_documents("owner/rows")


def test_what_datasets_cannot_read_is_told(tmp_path, monkeypatch):
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="empty.parquet` has no rows"):
        load_documents(str(tmp_path / "empty.parquet"))
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "rows.parquet")

    def fail(*_, **__):
        raise DatasetGenerationError("the disk is full.")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match="rows.parquet` cannot be read as parquet: the disk is full: check the file"):
        load_documents(str(tmp_path / "rows.parquet"))


def test_a_broken_list_of_objects_is_told(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a"},\n {"text": ]')
    with pytest.raises(ValueError, match="rows.json` is no JSON .*: check the file at that place"):
        load_documents(str(tmp_path / "rows.json"))


def test_a_file_packed_by_what_is_not_installed_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl.zst").write_bytes(b"any")
    monkeypatch.setattr("fsspec.compression.compr", {})
    with pytest.raises(ValueError, match="is packed by zstd.*pip install zstandard"):
        load_documents(str(tmp_path / "rows.jsonl.zst"))


def test_a_folder_has_no_other_split(folder):
    with pytest.raises(ValueError, match="`split` .'test'. must be 'train'"):
        load_documents(str(folder), split="test")


def test_a_long_document_becomes_consecutive_rows_and_nothing_is_lost():
    assert rows_of(["abcdefg", "hi"], 4) == ["abcd", "efg|", "hi|"]


def test_a_lone_last_token_has_nothing_to_predict():
    assert rows_of(["abcd", "x"], 4) == ["abcd", "x|"]


def test_joined_documents_fill_rows_of_one_length():
    assert rows_of(["abc", "de", "fghi"], 4, join_documents=True) == ["abc|", "de|f", "ghi|"]
    assert rows_of(["abc", "de"], 4, join_documents=True) == ["abc|"]  # the unfinished last row is left out
    text = "".join(rows_of(["abcdefg"] * 50, 8, join_documents=True))
    assert text == "abcdefg|" * 50  # across the batches in which documents are tokenized


def test_a_stream_is_cut_into_the_same_rows():
    stream = Dataset.from_dict({"text": ["abc", "de", "fghi"]}).to_iterable_dataset()
    rows = split_into_rows(stream, CharacterTokenizer(), 4, join_documents=True)
    assert [len(row["input_ids"]) for row in rows] == [4, 4, 4]


def test_an_end_that_the_tokenizer_sets_is_not_doubled():
    assert rows_of(["ab\0"], 4) == ["ab|"]


def test_too_few_tokens_for_a_row_are_refused():
    with pytest.raises(ValueError, match=r"1 documents do not fill one row of `row_tokens` \(64\)"):
        rows_of(["abc"], 64, join_documents=True)


def test_a_row_of_one_token_is_refused():
    with pytest.raises(ValueError, match=r"`row_tokens` \(1\) must be at least 2"):
        rows_of(["abc"], 1)

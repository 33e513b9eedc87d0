"""Files of rows (jsonl, JSON, parquet, CSV): `datasets` reads them, and a bad row is named by file, line and column.

`datasets` reads in pieces and knows every form. Its errors name neither file nor line, and it turns a number or an
object in a column of texts into a text without a word. So files of JSON are read line by line before it reads them,
and the first bad row is named; a stream has no such pass, and its lines are read here only. Parquet files say their
types. Price: a second pass over the lines.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .files import PIECE, decode, describe, encoding_of, not_utf8, open_regular, shown


logger = logging.getLogger(__name__)

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TEXT_TYPES = ("string", "large_string", "string_view")
# Characters that are a pattern, or join two addresses, to `datasets` and fsspec.
_AWKWARD = re.compile(r"[\[\]*?]|::|://|[\ud800-\udfff]")
# What `datasets` raises where the file is at fault; pyarrow's errors are `ValueError`s or `OSError`s.
BROKEN = (ValueError, OSError, EOFError, StopIteration, zlib.error, lzma.LZMAError, TypeError, KeyError)


def load_rows(
    name: str,
    kind: str,
    files: list[Path],
    skipped: Counter[str],
    *,
    split: str = "train",
    streaming: bool = False,
    text_field: str | None = None,
    or_columns: Collection[str] = (),
) -> Any:
    """Rows of `files`, in memory or as a stream that has a shard a file.

    Args:
        name (`str`): what the user gave, for messages.
        kind (`str`): builder of `datasets`: `json`, `parquet` or `csv`.
        files (`list[Path]`): regular files; empty ones are left out and counted in `skipped`.
        text_field (`str`, *optional*): column that must hold texts, where it is there.
        or_columns (`Collection[str]`, *optional*): columns next to which it need not.

    Raises:
        ValueError: nothing to read, or a file or row that cannot be; the message names it.
    """
    import datasets

    found = [file for file in files if file.stat().st_size]
    skipped["empty file"] += len(files) - len(found)
    if not found:
        raise ValueError(f"`{name}` has no rows: {'it is' if len(files) == 1 else 'all its files are'} empty.")
    for file in found:
        _check_beginning(file, kind)
    if streaming and kind == "csv":
        find_fault(kind, found, None)
        return datasets.load_dataset(
            kind, data_files=[plain_name(file) for file in found], split=split, streaming=True
        )
    if streaming:
        if split != "train":
            raise ValueError(f"`split` ({split!r}) must be 'train' for `{name}`: a stream of files has no other.")
        source: dict[str, Any] = {"files": [os.fsencode(file) for file in found], "kind": kind}
        source |= {"text_field": text_field, "or_columns": tuple(or_columns)}
        return datasets.IterableDataset.from_generator(_stream_rows, gen_kwargs=source)
    if kind == "json" and text_field is not None:
        find_fault(kind, found, text_field, or_columns)
    try:
        rows = datasets.load_dataset(kind, data_files=[plain_name(file) for file in found], split=split)
    except (*BROKEN, datasets.exceptions.DatasetGenerationError) as error:
        if str(error).startswith("Unknown split"):
            raise
        raise _explain(name, kind, found, text_field, error) from error
    if not len(rows):
        raise ValueError(f"`{name}` has no rows: check what was read.")
    if text_field in rows.column_names and not set(or_columns) & set(rows.column_names):
        said = getattr(rows.features[text_field], "dtype", None)
        column = rows.data.column(text_field)
        if said not in _TEXT_TYPES or column.null_count or not is_utf8(column):
            find_fault(kind, found, text_field)
            raise ValueError(
                f"`{name}`: `datasets` reads column `{text_field}` as {said}, and a document is a text: write other "
                "texts, or name another column."
            )
    return rows


def plain_name(file: Path) -> str:
    """A name of `file` that is no pattern and no chain of addresses.

    A link in the cache of `datasets` where its own is one: it reads `[1]` in a name as "the character 1" in one place
    and as an IPv6 address in another. The link is named by path, size and time, so an edited file is read again.
    """
    import datasets

    real = os.path.abspath(file)
    if not _AWKWARD.search(real):
        return real
    facts = os.stat(real)
    key = hashlib.sha256(os.fsencode(real) + f"|{facts.st_size}|{facts.st_mtime_ns}".encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE, "hf_longctx_links")
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / (key + "".join(suffix for suffix in file.suffixes[-2:] if suffix.lstrip(".").isalnum()))
    try:
        os.symlink(real, link)
    except FileExistsError:  # of an earlier run, or of another rank
        pass
    return str(link)


def _stream_rows(files: list[bytes], kind: str, text_field: str | None, or_columns: tuple[str, ...]) -> Iterator[dict]:
    for path in files:
        file = Path(os.fsdecode(path))
        for place, row in rows_of(kind, file):
            _check_row(f"`{shown(file)}`, {place}", row, text_field, or_columns)
            yield row


def _explain(name: str, kind: str, files: list[Path], text_field: str | None, error: BaseException) -> ValueError:
    """The first fault of the files or, where we find none, what `datasets` said."""
    try:
        find_fault(kind, files, None)
    except ValueError as fault:
        return fault
    said = str(error.__cause__ or error).strip() or type(error).__name__
    return ValueError(f"`{name}` cannot be read as {kind}: {said.splitlines()[0].rstrip('.')}: check the file.")


def find_fault(kind: str, files: list[Path], text_field: str | None, or_columns: Collection[str] = ()) -> None:
    """Raise `ValueError` for the first row that is broken or has no text; does nothing where all are right."""
    num_rows = 0
    for file in files:
        for place, row in rows_of(kind, file, text_field):
            num_rows += 1
            _check_row(f"`{shown(file)}`, {place}", row, text_field, or_columns)
    if not num_rows and kind != "csv":
        raise ValueError(f"`{shown(files[0])}` has no rows: check what was read.")


def rows_of(kind: str, file: Path, text_field: str | None = None) -> Iterator[tuple[str, Any]]:
    """Place (`line 3`) and value of every row of a file; of parquet the column `text_field` alone, if it is there.

    Raises:
        ValueError: the file is damaged or in another encoding; the message names it and the place.
    """
    try:
        yield from _READERS[kind](file, text_field)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"`{shown(file)}` is cut off or damaged ({error}): make it again.") from error


def _check_row(place: str, row: object, text_field: str | None, or_columns: Collection[str]) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {describe(row)}, and not a JSON object: write one with a key for every column.")
    if text_field is None or set(or_columns) & set(row):
        return
    if text_field not in row:
        if or_columns:
            return
        raise ValueError(
            f"{place} has no column `{text_field}`, only {', '.join(row)}: add it, or set the text field to another."
        )
    value = row[text_field]
    if not isinstance(value, str) or describe(value) != "a text":
        raise ValueError(_not_a_text(place, text_field, value))


def _not_a_text(place: str, text_field: str, value: object) -> str:
    said = describe(value)
    remedy = "move it to a column `messages`" if said.startswith("a conversation") else "mend or remove the row"
    return f"{place}: column `{text_field}` holds {said}, and a document is a text: {remedy}."


def _check_beginning(file: Path, kind: str) -> None:
    """Binary data or another encoding, told by the first bytes: zeros have no line that would end."""
    if kind == "parquet" or file.suffix.lower() in (*_OPENERS, ".zst"):
        return
    with open_regular(file) as opened:
        data = opened.read(PIECE)
    if encoding_of(data) is not None:
        raise ValueError(not_utf8(file, data, 0))
    if b"\0" in data:
        raise ValueError(
            f"`{shown(file)}` is binary: byte {data.index(0)} is 0x00, which no text has; give a file of {kind}."
        )


def open_rows(file: Path) -> BinaryIO:
    """The bytes of a regular file, unpacked where its name ends like a packed one's."""
    opened, packing = open_regular(file), file.suffix.lower()
    if packing == ".zst":
        from fsspec.compression import compr

        if "zstd" not in compr:
            raise ValueError(f"`{shown(file)}` is packed by zstd, which needs a package: run `pip install zstandard`.")
        return compr["zstd"](opened, mode="rb")
    return _OPENERS[packing](opened, "rb") if packing in _OPENERS else opened


def json_lines(lines: BinaryIO, name: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """Number and value of every line that is not blank; `ValueError` names the line, and the byte of a wrong one."""
    start = 0
    for number, line in enumerate(lines, 1):
        text = decode(line, name, start, number).strip()
        start += len(line)
        if not text:
            continue
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`{shown(name)}`, line {number} is no JSON ({error}): mend or remove it.") from error


def _json_rows(file: Path, text_field: str | None) -> Iterator[tuple[str, Any]]:
    """Rows of a file of JSON lines, of one list of objects, or of one object over several lines."""
    with open_rows(file) as lines:
        first = lines.readline(PIECE).removeprefix(b"\xef\xbb\xbf").strip()
        is_lines = not first.startswith(b"[") and not (first == b"{" and ".json" in file.suffixes)
    with open_rows(file) as lines:
        if is_lines:
            yield from ((f"line {number}", row) for number, row in json_lines(lines, file))
            return
        text = decode(lines.read(), file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{shown(file)}` is no JSON ({error}): check the file at that place.") from error
    rows = content if isinstance(content, list) else [content]
    yield from ((f"entry {number}", row) for number, row in enumerate(rows))


def _parquet_rows(file: Path, text_field: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow.lib
    import pyarrow.parquet

    number = 0
    with open_regular(file) as opened:
        try:
            table = pyarrow.parquet.ParquetFile(opened)
            columns = [text_field] if text_field in table.schema_arrow.names else None
            for batch in table.iter_batches(batch_size=1000, columns=columns):
                for row in _python_rows(batch, f"`{shown(file)}`", number):
                    yield f"row {number}", row
                    number += 1
        except (pyarrow.lib.ArrowException, OSError) as error:
            raise ValueError(f"`{shown(file)}` is no parquet file, or damaged ({error}): make it again.") from error


def _python_rows(batch: Any, name: str, number: int) -> list[dict[str, Any]]:
    """Rows of a batch of Arrow, which keeps whatever bytes a file calls text; `number` is that of the first."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        wrong = next(row for row in range(len(batch)) if not all(map(is_utf8, batch.slice(row, 1).columns)))
        raise ValueError(f"{name}, row {number + wrong} is not UTF-8 ({error}): write its texts as UTF-8.") from error


def is_utf8(column: Any) -> bool:
    """Whether all texts in a column of Arrow can be read."""
    import pyarrow.lib

    try:
        column.validate(full=True)
    except pyarrow.lib.ArrowInvalid:
        return False
    return True


def _csv_rows(file: Path, text_field: str | None) -> Iterator[tuple[str, Any]]:
    start = 0
    with open_rows(file) as lines:
        for number, line in enumerate(lines, 1):
            decode(line, file, start, number)
            start += len(line)
    yield from ()


_READERS = {"json": _json_rows, "parquet": _parquet_rows, "csv": _csv_rows}

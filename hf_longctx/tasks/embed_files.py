"""Rows of texts from files for embedding: jsonl, parquet and csv, one file or a folder of them.

Lines may be objects with a key a column, or any form that the training data of sentence-transformers have, see
`read_line`. Every row is checked as it is read, and a bad one is named by file, line and column. Rows in memory are
Arrow's: only `CHUNK` of them are Python objects at a time.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import fsspec

from ..data.data_files import find_fault, is_utf8, json_lines, load_rows, open_rows, rows_of
from ..data.files import count_reasons, describe, shown, walk
from ..data.sources.rows import LABEL_COLUMNS


logger = logging.getLogger(__name__)

HUB_FILES = "hf://datasets/"
LINES = (".jsonl", ".jsonl.gz")
TABLES = {".parquet": "parquet", ".csv": "csv"}
CHUNK = 1000  # rows
_NO_TEXTS = ("int", "uint", "float", "double", "bool", "null", "timestamp", "date", "decimal")


def open_file(place: str, columns: list[str] | None, num_texts: int | None, streaming: bool) -> Any:
    """Rows of one file of lines, here or on the Hub, or of one table that is here.

    Raises:
        ValueError: no regular file, another encoding, or a row without a text; the message names file and line.
    """
    if place.endswith(LINES):
        return _open_lines([place], columns, num_texts, streaming)
    return _open_table(place, TABLES[Path(place).suffix], [Path(place)], Counter(), columns, num_texts, streaming)


def open_folder(folder: str, columns: list[str] | None, num_texts: int | None, streaming: bool) -> Any:
    """Rows of the training files of a folder, as `datasets` finds them; `None` where it holds other forms.

    Only regular files inside the folder are read; the others are counted by reason in one line of the log.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    skipped = Counter[str]()
    inside = {os.path.realpath(file): file for file in walk(Path(folder), skipped)}
    leads_out = skipped["link out of the folder"]
    if (Path(folder) / "README.md").is_file():  # it may name configurations and splits, which `datasets` reads
        return _refuse_links(folder, leads_out) if leads_out else None
    if not inside:
        raise ValueError(f"`{shown(folder)}` has no file to read ({count_reasons(skipped) or 'it is empty'}).")
    found = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder).get("train", [])
    files = [inside[real] for real in (os.path.realpath(file) for file in found) if real in inside]
    kinds = {_kind_of(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        return _refuse_links(folder, leads_out) if leads_out else None
    if skipped.total():
        logger.warning("skipped %d files in `%s`: %s", skipped.total(), shown(folder), count_reasons(skipped))
    kind = kinds.pop()
    if kind == "json":
        return _open_lines([str(file) for file in files], columns, num_texts, streaming)
    return _open_table(folder, str(kind), files, skipped, columns, num_texts, streaming)


def _kind_of(file: Path) -> str | None:
    return "json" if file.name.endswith(LINES) else TABLES.get(file.suffix)


def _refuse_links(folder: str, number: int) -> None:
    raise ValueError(
        f"`{shown(folder)}` holds {number} links that lead out of it, which `datasets` would follow: copy the files "
        "into the folder, or take the links out."
    )


def _open_lines(places: list[str], columns: list[str] | None, num_texts: int | None, streaming: bool) -> Any:
    from datasets import Dataset, IterableDataset
    from datasets.table import InMemoryTable

    source: dict[str, Any] = {"files": [os.fsencode(place) for place in places], "kind": "json"}
    source |= {"columns": columns and tuple(columns), "num_texts": num_texts}  # a list would be split between shards
    if streaming:
        return IterableDataset.from_generator(checked_rows, gen_kwargs=source)
    import pyarrow

    rows = checked_rows(**source)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"`{places[0]}` has no rows: check what was read.")
    rows, tables = chain([first], rows), []
    while chunk := list(islice(rows, CHUNK)):
        try:
            tables.append(pyarrow.table({name: [row.get(name) for row in chunk] for name in first}))
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"`{places[0]}` mixes types in one column ({error}): name the columns of texts with `source_columns`."
            ) from error
    table = InMemoryTable(pyarrow.concat_tables(tables, promote_options="permissive"))
    return Dataset(table, fingerprint=_fingerprint(places, columns))  # else the whole table would be pickled for one


def _fingerprint(places: list[str], columns: list[str] | None) -> str:
    """The same for the same files in the same state."""
    key = hashlib.sha256(repr(columns).encode())
    for place in places:
        facts = os.stat(place) if os.path.exists(place) else None
        key.update(os.fsencode(place) + repr(facts and (facts.st_size, facts.st_mtime_ns)).encode())
    return key.hexdigest()[:16]


def _open_table(
    name: str,
    kind: str,
    files: list[Path],
    skipped: Counter[str],
    columns: list[str] | None,
    num_texts: int | None,
    streaming: bool,
) -> Any:
    from datasets import IterableDataset

    if streaming and kind == "parquet":
        source: dict[str, Any] = {"files": [os.fsencode(file) for file in files], "kind": kind}
        source |= {"columns": columns and tuple(columns), "num_texts": num_texts}
        return IterableDataset.from_generator(checked_rows, gen_kwargs=source)
    rows = load_rows(name, kind, files, skipped, streaming=streaming)
    if not streaming:
        for column in _texts(rows.column_names, columns, num_texts):
            said = str(getattr(rows.features[column], "dtype", ""))
            is_text, is_other = "string" in said, said.startswith(_NO_TEXTS)
            cells = rows.data.column(column)
            if is_other or (is_text and (cells.null_count or not is_utf8(cells))):
                find_fault(kind, files, column)
            if is_other:
                raise ValueError(
                    f"`{shown(name)}`: column `{column}` is read as {said}, and a text is needed: name the columns of "
                    "texts with `source_columns`."
                )
    return rows


def checked_rows(
    files: list[bytes], kind: str, columns: Sequence[str] | None, num_texts: int | None
) -> Iterator[dict[str, Any]]:
    """Rows of files, less columns that nobody wants; `ValueError` names file, line and column of a bad one."""
    kept: list[str] | None = None
    for file in files:
        place = os.fsdecode(file)
        for where, row in _lines(place) if kind == "json" else rows_of(kind, Path(place)):
            if kept is None:
                texts = _texts(list(row), columns, num_texts)
                kept = [*texts, *(name for name in row if name in LABEL_COLUMNS and name not in texts)]
                if columns and set(columns) - set(row):
                    kept = list(row)  # who chooses the columns reports it
                    texts = []
            for name in texts:
                _check_text(f"`{shown(place)}`, {where}", row, name)
            yield {name: row.get(name) for name in kept}


def _texts(found: list[str], columns: Sequence[str] | None, num_texts: int | None) -> list[str]:
    texts = list(columns) if columns else [name for name in found if name not in LABEL_COLUMNS]
    return [name for name in texts[:num_texts] if name in found]


def _check_text(place: str, row: Mapping[str, Any], name: str) -> None:
    if name not in row:
        raise ValueError(f"{place} has no column `{name}`, only {', '.join(row)}: mend or remove the row.")
    value = row[name]
    for text in value if isinstance(value, (list, tuple)) and value else [value]:
        if not isinstance(text, str) or describe(text) != "a text":
            raise ValueError(
                f"{place}: column `{name}` holds {describe(text)}, and a text is needed: mend or remove the row, or "
                "name the columns of texts with `source_columns`."
            )


def _lines(place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if place.startswith(HUB_FILES):
        with fsspec.open(place, "rb") as file:
            yield from _rows_of_lines(gzip.open(file) if place.endswith(".gz") else file, place)
        return
    with open_rows(Path(place)) as file:
        yield from _rows_of_lines(file, place)


def _rows_of_lines(lines: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for number, value in json_lines(lines, place):
            try:
                row = read_line(value, random.Random(number - 1))
            except ValueError as error:
                raise ValueError(f"`{shown(place)}`, line {number} {error}") from error
            if row is not None:
                yield f"line {number}", row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"`{shown(place)}` is cut off or damaged ({error}): make it again.") from error


def read_line(line: Any, chance: random.Random) -> dict[str, Any] | None:
    """One line as a row; `None` for a set of one text."""
    if isinstance(line, Mapping) and not {"set", "texts", "pos"} & set(line):
        return dict(line)
    if isinstance(line, Mapping) and "pos" in line:
        texts = [_required(line, "query"), chance.choice(_list_of(line, "pos"))]
        texts += [chance.choice(_list_of(line, "neg"))] if line.get("neg") else []
    elif isinstance(line, Mapping) and "set" in line:
        found = _list_of(line, "set")
        texts = chance.sample(found, 2) if len(found) > 1 else []
    else:
        texts = _list_of(line, "texts") if isinstance(line, Mapping) else line
    if not isinstance(texts, list):
        raise ValueError(f"is {describe(line)}, and neither an object nor a list of texts: mend or remove it.")
    names = ["anchor", "positive", "negative", *(f"negative_{index}" for index in range(2, len(texts)))]
    return dict(zip(names, texts)) if texts else None


def _required(line: Mapping[str, Any], key: str) -> Any:
    if key not in line:
        raise ValueError(f"has no key `{key}`, only {', '.join(line)}: mend or remove it.")
    return line[key]


def _list_of(line: Mapping[str, Any], key: str) -> list[Any]:
    value = line[key]
    if not isinstance(value, list) or (key != "set" and key != "texts" and not value):
        raise ValueError(f"has {describe(value)} under `{key}`, and not a list of texts: mend or remove it.")
    return value

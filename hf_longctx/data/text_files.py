"""A folder of documents, one file a row: text, Markdown, code.

Files are read in pieces, so that one that is binary is dropped after its first piece, whatever its size; a text takes
its own size and one piece. A file is read up to the size that it had when the folder was listed.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import PIECE, encoding_of, not_utf8, open_regular, shown


logger = logging.getLogger(__name__)

_UNREADABLE = "binary, empty or not UTF-8"


def read_folder(
    name: str, root: Path, files: list[Path], skipped: Counter[str], *, split: str = "train", streaming: bool = False
) -> Any:
    """A row of `text` and `path` a file; files without text are left out and counted in `skipped`.

    Raises:
        ValueError: a split other than `"train"`, or no file with text.
    """
    import datasets

    if split != "train":
        raise ValueError(f"`split` ({split!r}) must be 'train' for `{name}`: a folder of documents has no other.")
    # Sizes and times are among the arguments so that an edited file is read again, not found in a cache. Names go as
    # bytes, since not every name is UTF-8.
    source = {"files": [(os.fsencode(file), shown(file.relative_to(root)), *_stamp(file)) for file in files]}
    if streaming:
        return datasets.IterableDataset.from_generator(_stream_documents, gen_kwargs=source)
    text = datasets.Value("large_string")  # one batch of long documents passes the 2 GiB of an ordinary string column
    string = datasets.Value("string")
    features = datasets.Features({"text": text, "path": string, "fault": string})
    rows = datasets.Dataset.from_generator(_read_documents, features=features, gen_kwargs=source)
    faults = rows["fault"][:]
    good = [number for number, fault in enumerate(faults) if fault is None]
    reasons = Counter[str](_reason(fault) for fault in faults if fault is not None)
    if not good:
        if len(files) == 1 and reasons["not UTF-8"]:
            raise ValueError(f"`{name}` cannot be read as text: {faults[0]}")
        raise ValueError(
            f"all {len(files)} files of `{name}` are {_UNREADABLE} ({_first(faults)}): save them as UTF-8."
        )
    if reasons:
        if reasons["not UTF-8"]:
            reasons[f"not UTF-8 ({_first(faults)})"] = reasons.pop("not UTF-8")
        skipped.update(reasons)
        rows = rows.select(good)
    return rows.remove_columns("fault")


def _reason(fault: str) -> str:
    return "not UTF-8" if " is not UTF-8" in fault else fault.rsplit(" ", 1)[-1].rstrip(".")


def _first(faults: list[str | None]) -> str:
    """The fault that says most: an encoding before others."""
    named = [fault for fault in faults if fault is not None]
    return next((fault for fault in named if " is not UTF-8" in fault), named[0]).rstrip(".")


def _stamp(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns


def _read_documents(files: list[tuple[bytes, str, int, int]]) -> Iterator[dict]:
    for path, name, size, _time in files:
        text, fault = read_document(os.fsdecode(path), name, size)
        yield {"text": text, "path": name, "fault": fault}


def _stream_documents(files: list[tuple[bytes, str, int, int]]) -> Iterator[dict]:
    for row in _read_documents(files):
        fault = row.pop("fault")
        if fault is None:
            yield row
        else:
            logger.warning("skipped: %s", fault)


def read_document(path: str, name: str, size: int) -> tuple[str | None, str | None]:
    """The text of a file, or why it has none.

    Args:
        path (`str`): a regular file.
        name (`str`): its name in messages.
        size (`int`): bytes that are read at most.
    """
    decoder, text, start = codecs.getincrementaldecoder("utf-8-sig")(), io.StringIO(), 0
    with open_regular(path) as file:
        while piece := file.read(min(PIECE, size - start)):
            kept = decoder.getstate()[0]  # the beginning of a letter, from the piece before
            if start == 0 and encoding_of(piece) is not None:
                return None, not_utf8(name, piece, 0)
            if b"\0" in piece:
                return None, f"`{name}` is binary."
            try:
                text.write(decoder.decode(piece))
            except UnicodeDecodeError as error:
                data = kept + piece
                return None, not_utf8(name, data, error.start, start - len(kept))
            start += len(piece)
    left = decoder.getstate()[0]
    if left:  # half a letter
        return None, not_utf8(name, left, 0, start - len(left))
    found = text.getvalue()
    return (found, None) if found.strip() else (None, f"`{name}` is empty.")

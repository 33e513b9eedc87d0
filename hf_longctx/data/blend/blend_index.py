"""The index of a blend: source and row of each of its rows, as two arrays on disk that processes map into memory.

It is built once, by the process that gets the lock, into a folder of another name, which is then renamed: so there is
a whole index or none. The folder's name is a hash of names, weights, rows and seed; what the sources were is written
inside and compared, so that sources that changed under a running project are refused and not blended anew. Price: 6
bytes a row on disk (10 above 2^32 rows a source), and memory that does not grow with the rows.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .chairman import assign_sources
from .passes import Passes
from .proportions import Proportions
from .source_content import MOST_READ, SourceContent


logger = logging.getLogger(__name__)

_FORMAT = 2  # and other rows than before belong to another one
_SOURCES, _ROWS, _FACTS = "sources.npy", "rows.npy", "blend.json"
_LOOKED_AT = 2**18  # rows that are sorted by source at a time


class BlendIndex(NamedTuple):
    """Source number and row number of each row of a blend."""

    sources: np.ndarray
    rows: np.ndarray


def build_in_memory(proportions: Proportions, passes: Sequence[Passes]) -> BlendIndex:
    """The index as arrays of this process."""
    pieces = list(_pieces(proportions, passes))
    return BlendIndex(*(np.concatenate(arrays) for arrays in zip(*pieces)))


def open_or_build(
    cache_dir: str | os.PathLike,
    settings: dict[str, Any],
    contents: dict[str, SourceContent],
    proportions: Proportions,
    passes: Sequence[Passes],
) -> BlendIndex:
    """The index in `cache_dir`, built there by one process if it is not there yet.

    Args:
        settings (`dict`): what the blend was asked to be; its hash is the folder's name.
        contents (`dict`): what its sources are, by name.

    Raises:
        ValueError: the folder cannot be written or has no room, the index is damaged, or was built of other sources.
    """
    name = "blend-" + hashlib.sha256(json.dumps([_FORMAT, settings], sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir, name)
    if not folder.is_dir():
        # Of the libraries that torch and huggingface_hub bring along: a lock that ends with its process.
        from filelock import FileLock

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(str(folder) + ".lock"):
                if not folder.is_dir():
                    facts = {name: content.facts() for name, content in contents.items()}
                    _build(folder, {"settings": settings, "sources": facts}, proportions, passes)
        except OSError as error:
            _refuse_folder(cache_dir, error)
    _compare(folder, contents)
    return _open(folder, int(proportions.ends[-1]))


def _pieces(proportions: Proportions, passes: Sequence[Passes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    given = [0] * len(passes)
    kind = row_dtype(passes)
    for assigned in assign_sources(proportions):
        for start in range(0, len(assigned), _LOOKED_AT):
            sources = assigned[start : start + _LOOKED_AT]
            rows = np.empty(len(sources), dtype=kind)
            order = np.argsort(sources, kind="stable")
            counts = np.bincount(sources, minlength=len(passes)).tolist()
            end = 0
            for source, count in enumerate(counts):
                if count:
                    rows[order[end : end + count]] = passes[source].rows(given[source], count)
                    given[source], end = given[source] + count, end + count
            yield sources, rows


def row_dtype(passes: Sequence[Passes]) -> type:
    return np.uint32 if max(each.size for each in passes) <= 2**32 else np.uint64


def _build(folder: Path, facts: dict[str, Any], proportions: Proportions, passes: Sequence[Passes]) -> None:
    num_rows, kinds = int(proportions.ends[-1]), (np.uint16, row_dtype(passes))
    needed = num_rows * sum(np.dtype(kind).itemsize for kind in kinds)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 1e9:.3g} GB are free, and the index takes {needed / 1e9:.3g} GB")
    logger.info("building the index of %s rows in `%s`", f"{num_rows:,}", folder)
    unfinished = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        # Written and not mapped: a full disk is then an error, and not a signal that ends the process.
        with open(unfinished / _SOURCES, "wb") as sources, open(unfinished / _ROWS, "wb") as rows:
            files = (sources, rows)
            for file, kind in zip(files, kinds):
                header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (num_rows,)}
                np.lib.format.write_array_header_1_0(file, header)
            for arrays in _pieces(proportions, passes):
                for file, array in zip(files, arrays):
                    file.write(np.ascontiguousarray(array).data)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        (unfinished / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.chmod(unfinished, 0o777 & ~_umask())
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse_folder(cache_dir: str | os.PathLike, error: OSError) -> None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space, or choose a `cache_dir` on another disk"
    else:
        remedy = "choose a folder that this process may write, or build the index once where it may"
    reason = error.strerror or error
    raise ValueError(
        f"`cache_dir` ({os.fspath(cache_dir)}) cannot hold the index of the blend: {reason}; {remedy}."
    ) from error


def _compare(folder: Path, contents: dict[str, SourceContent]) -> None:
    """Raise `ValueError` if the index was built of other sources."""
    names = ("rows", "origin", "hash", "is_whole")
    try:
        built: dict[str, dict] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))["sources"]
        was = {name: [fact[each] for each in names] for name, fact in built.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _refuse_damaged(folder, error)
    for name, content in contents.items():
        rows, origin, known, is_whole = was.get(name, [None] * 4)
        if rows != content.rows:
            change = f"had {rows:,} rows" if rows is not None else "was not there"
            change = f"{change} and has {content.rows:,}"
        elif origin is not None and origin == content.origin:
            continue
        elif known != content.hash and None not in (known, content.hash):
            change = "has as many rows as before, but other ones"
        else:
            if not is_whole and origin != content.origin:
                logger.warning(
                    f"the source `{name}` comes from other files than when the index in `{folder}` was built; "
                    f"{MOST_READ:,} of its {rows:,} rows are the same, and the others were not compared"
                )
            continue
        raise ValueError(
            f"the index in `{folder}` was built when the source `{name}` {change}: a run that goes on would read "
            "other rows; give it the sources of that time, or another `cache_dir`."
        )


def _open(folder: Path, num_rows: int) -> BlendIndex:
    try:
        index = BlendIndex(*(np.load(folder / name, mmap_mode="r") for name in (_SOURCES, _ROWS)))
    except (OSError, ValueError, EOFError) as error:
        _refuse_damaged(folder, error)
    if not len(index.sources) == len(index.rows) == num_rows:
        _refuse_damaged(folder, None)
    return index


def _refuse_damaged(folder: Path, error: Exception | None) -> None:
    raise ValueError(
        f"the index in `{folder}` is damaged ({error or 'its arrays have another length'}): remove that folder, and "
        "it is built again."
    ) from error

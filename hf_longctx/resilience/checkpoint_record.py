"""A checkpoint's own record: bytes and SHA-256 of each of its files, written last and proven before a run is resumed.

`hf_longctx.json` holds the facts of the run and, under `files`, every other file of the folder. The file next to it,
`hf_longctx.json.sha256`, holds the hash of the record itself, as `sha256sum` writes it. So neither can be changed,
lost or taken from another checkpoint without the other telling. Price: every file is read once, from the page cache
when it was just written; see docs/fault_tolerance.md.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' own name for it
RUN_FILE = "hf_longctx.json"
SEAL = f"{RUN_FILE}.sha256"
_OURS = (UNFINISHED, RUN_FILE, SEAL)
_THREADS = 8  # hashlib lets go of the GIL
# What transformers reads when it finds it, whatever else is there. A file of another run among these is no spectator.
_READ_IF_THERE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "model.safetensors")
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EISDIR)


def write_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Put every file of `folder` on the disk, and then their sizes and hashes."""
    files = list_files(folder)
    sync(files.values())
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(hash_file, files.values())
        entries = {
            name: {"bytes": path.stat().st_size, "sha256": found} for (name, path), found in zip(files.items(), hashes)
        }
    record = json.dumps({**facts, "files": entries}, indent=2) + "\n"
    (folder / RUN_FILE).write_bytes(record.encode())
    (folder / SEAL).write_bytes(_seal_of(record.encode()))
    sync([folder / RUN_FILE, folder / SEAL])
    sync_folders(folder)


def list_files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` but the mark, the record and its seal, by its path from there."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name not in _OURS and not path.name.startswith(".nfs")}


def sync(paths: Iterable[Path]) -> None:
    """Wait until what was written to these files is on the disk; not on Windows, which syncs none opened to read."""
    for path in paths if sys.platform != "win32" else ():
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def sync_folders(folder: Path) -> None:
    """The same for the names in `folder`, in the folders below it and in the one above."""
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent):
        try:
            sync([path])
        except OSError as error:
            if error.errno not in _NO_SYNC:  # some network file systems know no fsync of a folder
                raise


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal_of(record: bytes) -> bytes:
    return f"{hashlib.sha256(record).hexdigest()}  {RUN_FILE}\n".encode()


def read_json(path: Path, kind: type = dict) -> Any:
    """The object in a file of JSON, or the list; `ValueError`, with the file's name, if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` cannot be read ({error}): resume from another checkpoint.") from error
    if not isinstance(content, kind):
        name = "object" if kind is dict else "list"
        raise ValueError(f"`{path}` holds no JSON {name}: resume from another checkpoint.")
    return content


def read_record(folder: Path) -> dict[str, Any] | None:
    """What the record says of each file, or `None` for a checkpoint without one (older, or not ours).

    Raises:
        ValueError: the record is lost, damaged or of another checkpoint.
    """
    path, seal = folder / RUN_FILE, folder / SEAL
    if not path.is_file():
        if seal.is_file():
            raise ValueError(f"`{path}` is missing, and `{SEAL}` is its hash: resume from another checkpoint.")
        return None
    files = read_json(path).get("files")
    if files is None and not seal.is_file():
        return None
    if not seal.is_file():
        raise ValueError(f"`{seal}` is missing, without which `{RUN_FILE}` proves nothing: resume from another one.")
    if seal.read_bytes() != _seal_of(path.read_bytes()):
        raise ValueError(
            f"`{path}` is not the file that was saved: its SHA-256 is not that in `{SEAL}`; resume from another "
            "checkpoint."
        )
    entries = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(e, dict) and type(e.get("bytes")) is int and "sha256" in e for e in entries):
        raise ValueError(f"`{path}` has no `bytes` and `sha256` for each of its `files`: resume from another one.")
    return files


def check_record(folder: Path, share: tuple[int, int] | None = (0, 1)) -> bool:
    """Raise `ValueError` unless `folder` holds the files of its record, as they were saved.

    Args:
        folder (`Path`): a checkpoint.
        share (`tuple[int, int]`, *optional*): `(i, n)`: hash the `i`-th of `n` shares of the files, since the ranks of
            a node divide them. `None`: compare sizes only.

    Returns:
        `bool`: whether there is a record.
    """
    record = read_record(folder)
    if record is None:
        return False
    for name, entry in record.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"`{path}` is missing, and was saved with this checkpoint: resume from another one.")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"`{path}` has {path.stat().st_size} bytes and was saved with {entry['bytes']}: resume from another "
                "checkpoint."
            )
    for path in (path for pattern in _READ_IF_THERE for path in folder.glob(pattern)):
        if path.name not in record:
            raise ValueError(
                f"`{path}` was not saved with this checkpoint, and resuming would read it: remove it, or resume from "
                "another one."
            )
    if share is not None:
        _check_hashes(folder, record, share)
    return True


def _check_hashes(folder: Path, record: dict[str, Any], share: tuple[int, int]) -> None:
    index, count = share
    by_size = sorted(record, key=lambda name: (-record[name]["bytes"], name))  # the largest go to different ranks
    mine = by_size[index::count]
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(mine, pool.map(hash_file, (folder / name for name in mine))):
            if found != record[name]["sha256"]:
                raise ValueError(
                    f"`{folder / name}` is not the file that was saved: its SHA-256 is not that in `{RUN_FILE}`. "
                    f"Resume from another checkpoint, or, if it was changed on purpose, delete `{RUN_FILE}` and "
                    f"`{SEAL}`."
                )

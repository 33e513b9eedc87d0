"""Which files of a folder may be read, and how one is opened: regular files inside it and nothing else.

A folder that somebody else filled can hold a pipe that never ends, a link to a device, or a link to `~/.ssh`. Each is
left out and counted, with its reason, before anything is opened. Price: one `lstat` a file, one `stat` a link.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


PIECE = 1 << 20  # bytes that are read at a time
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
_KINDS |= {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_ENCODINGS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def shown(path: str | os.PathLike) -> str:
    """A name as it can be printed and stored: bytes that are no UTF-8 as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def irregular(path: str | os.PathLike) -> str | None:
    """What `path` is where it is no regular file: a pipe, a device, a broken link; `None` for a regular file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "a broken link" if os.path.islink(path) else "gone"
    if stat.S_ISREG(mode):
        return None
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for bytes; a pipe is not waited for.

    Raises:
        ValueError: `path` is something else, or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ValueError(f"`{shown(path)}` cannot be read ({error.strerror}): check its name and rights.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"`{shown(path)}` is {irregular(path)} and no regular file: give a file.")
    return os.fdopen(descriptor, "rb")


def select_files(paths: Iterable[Path], root: Path, skipped: Counter[str]) -> list[Path]:
    """Those of `paths` that are regular files inside `root`; the others are counted in `skipped` by their reason."""
    roots = _real_roots(root)
    return [path for path in paths if _may_read(path, roots, skipped)]


def walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Visible regular files under `folder`, in the order of their paths; the others are counted by their reason."""
    roots = _real_roots(folder)

    def count_unreadable(error: OSError) -> None:
        skipped["folder that cannot be read"] += 1

    for here, folders, names in os.walk(folder, onerror=count_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        skipped["link to a folder"] += sum(os.path.islink(os.path.join(here, name)) for name in folders)
        for name in sorted(names):
            if not name.startswith(".") and _may_read(Path(here, name), roots, skipped):
                yield Path(here, name)


def count_reasons(skipped: Counter[str]) -> str:
    """`2 link out of the folder, 1 named pipe`: the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in skipped.most_common() if count)


def is_inside(path: str | os.PathLike, root: str | os.PathLike) -> bool:
    """Whether `path`, with all links followed, lies in `root` or, in the Hub's cache, among the files it links to."""
    return any(_is_below(os.path.realpath(path), real) for real in _real_roots(Path(root)))


def decode(data: bytes, path: str | os.PathLike, start: int = 0, line: int | None = None) -> str:
    """UTF-8 text of `data`, which begins at byte `start` of a file.

    Raises:
        ValueError: another encoding; the message names file, byte and remedy.
    """
    try:
        return data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(path, data, error.start, start, line)) from error


def not_utf8(path: str | os.PathLike, data: bytes, wrong: int, start: int = 0, line: int | None = None) -> str:
    """The message about byte `wrong` of `data`, which begins at byte `start` of the file."""
    name = encoding_of(data) if start == 0 else None
    where = f"byte {start + wrong}" + (f", in line {line}," if line is not None else "")
    remedy = f"iconv -f {name or 'LATIN1'} -t UTF-8"
    return f"`{shown(path)}` is not UTF-8: {where} is 0x{data[wrong]:02x}; convert it, for example with `{remedy}`."


def encoding_of(data: bytes) -> str | None:
    """UTF-16 or UTF-32, where the first bytes of a file say so."""
    return next((name for mark, name in _ENCODINGS if data.startswith(mark)), None)


def read_text(path: str | os.PathLike) -> str:
    """The whole text of a regular file in UTF-8; `ValueError` names the file and the byte where it is none."""
    with open_regular(path) as file:
        return decode(file.read(), path)


def read_json(path: str | os.PathLike, kind: type | tuple[type, ...] = dict) -> Any:
    """The object, or list, in a file of JSON that a user gave.

    Raises:
        ValueError: no regular file, not UTF-8, no JSON, or another kind of value; the message names file and line.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{shown(path)}` is no JSON ({error}): check the file at that place.") from error
    if not isinstance(content, kind):
        wanted = "list" if kind is list else "object"
        raise ValueError(f"`{shown(path)}` holds {describe(content)}, and not a JSON {wanted}: check the file.")
    return content


def describe(value: object) -> str:
    """What a value that should be a text is, in words."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {json.dumps(value)}"
    if isinstance(value, (list, tuple)):
        is_chat = bool(value) and all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in value)
        return "a conversation (a list of messages)" if is_chat else "a list"
    if isinstance(value, str):
        return "a text that no UTF-8 can hold" if any("\ud800" <= letter <= "\udfff" for letter in value) else "a text"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _may_read(path: Path, roots: list[str], skipped: Counter[str]) -> bool:
    reason = irregular(path)
    if reason is None and os.path.islink(path) and not any(_is_below(os.path.realpath(path), root) for root in roots):
        reason = "a link out of the folder"
    elif reason is None and not any(_is_below(os.path.realpath(path), root) for root in roots):
        reason = "a link out of the folder"  # one of its folders is the link
    elif reason is None and not os.access(path, os.R_OK):
        reason = "a file without the right to read it"
    if reason is not None:
        skipped[reason.removeprefix("a ").removeprefix("an ")] += 1
    return reason is None


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _real_roots(folder: Path) -> list[str]:
    """The folder and, where it is a snapshot in the Hub's cache, the folder that all its files are links to."""
    real = Path(os.path.realpath(folder))
    for parent in (real, *real.parents):
        blobs = parent.parent / "blobs"
        if parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return [str(real), str(blobs)]
    return [str(real)]

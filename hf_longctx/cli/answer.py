"""What a command says: lines for people, or with `--json` one object for programs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


STDOUT = "-"
OK, REFUSED = "ok", "refused"
# Between two lines of progress where no terminal can show one that changes.
_SECONDS_A_LINE = 5.0


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json` to a command."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help=(
            "print one JSON object and nothing else; with FILE write it "
            "there, beside the usual lines; default: lines only"
        ),
    )


class Answer:
    """Collects what a command found. Progress goes to stderr, so that it is in nobody's way.

    Args:
        options (`argparse.Namespace`): of the command, with `command` and `json`.

    Attributes:
        console (`rich.console.Console`): for the lines; silent where stdout is for JSON alone.
        facts (`dict`): what the JSON object holds, beside the command, the version, the outcome and the exit code.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from rich.console import Console

        words = (options.command, getattr(options, "action", None))
        self.command, self.target = " ".join(filter(None, words)), options.json
        self.console = Console(soft_wrap=True, highlight=False, quiet=self.target == STDOUT)
        self.facts: dict[str, Any] = {}
        self.outcome, self.message = OK, ""
        self._said = time.monotonic()
        self._status: Any = None

    def validate(self) -> None:
        """Refuse before the work what could not be written after it."""
        if self.target in (None, STDOUT):
            return
        path, self.target = Path(self.target), None  # which is not written where it is refused
        if path.is_dir():
            raise ValueError(f"`--json` ({path}) is a folder: name a file in it.")
        if not path.parent.is_dir():
            raise ValueError(f"the folder of `--json` ({path}) does not exist: make it first.")
        if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise ValueError(f"`--json` ({path}) cannot be written: name a file in a folder that you may write to.")
        self.target = str(path)

    def print(self, text: Any, **look: Any) -> None:
        """A line for people, its brackets as they are."""
        self.console.print(text, **{"markup": False, **look})

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show what is being done; inside, [`Answer.progress`] changes the words."""
        from rich.console import Console

        shown = Console(stderr=True)
        if not shown.is_terminal:
            self._said = time.monotonic()
            sys.stderr.write(f"{what} ...\n")
            yield
            return
        with shown.status(what) as self._status:
            try:
                yield
            finally:
                self._status = None

    def progress(self, what: str) -> None:
        """Say what is being done now."""
        if self._status is not None:
            self._status.update(what)
        elif time.monotonic() - self._said > _SECONDS_A_LINE:
            self._said = time.monotonic()
            sys.stderr.write(f"{what} ...\n")

    def refuse(self, error: BaseException | str) -> int:
        """The end of a command that cannot do what was asked for."""
        self.outcome, self.message = REFUSED, str(error)
        self.console.print("[bold red]refused[/]:", end=" ")
        self.print(self.message)
        return 2

    def end(self, code: int) -> int:
        """Write the object, where one is wanted, and return the exit code."""
        if self.target is None:
            return code
        from .. import __version__

        head = {"command": self.command, "version": __version__, **self.facts}
        head |= {"outcome": self.outcome, "exit_code": code, "message": self.message}
        text = json.dumps(_plain(head), indent=2, allow_nan=False) + "\n"
        if self.target == STDOUT:
            sys.stdout.write(text)
            return code
        try:
            Path(self.target).write_text(text, encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"`--json` ({self.target}) was not written: {error}\n")
            return code or 2
        self.print(f"wrote {self.target}")
        return code


def _plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite become `null`, NumPy's become Python's."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(held) for name, held in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(held) for held in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)

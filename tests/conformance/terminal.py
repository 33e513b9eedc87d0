"""What the sweep shows: how far it is, each failure with what the libraries wrote meanwhile, and nothing else.

The processes that prove write hundreds of lines of warnings. They inherit standard output and error of this one, so
both are led into a file as long as it lasts.
"""

from __future__ import annotations

import os
import sys
import tempfile

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


EVERY = 25
_MOST_CHARACTERS = 8_000


class Terminal:
    """A bar on a terminal, one line every 25 types in a pipe; used as a context manager."""

    total = done = 0

    def __enter__(self) -> Terminal:
        sys.stdout.flush()
        sys.stderr.flush()
        self._log = tempfile.TemporaryFile()
        self._saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        self._out = open(os.dup(1), "w", buffering=1)
        for descriptor in self._saved:
            os.dup2(self._log.fileno(), descriptor)
        self._console = Console(file=self._out, soft_wrap=True, highlight=False)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        redirect = {"redirect_stdout": False, "redirect_stderr": False}
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal, **redirect)
        self._task = self._bar.add_task("", total=None)
        self._bar.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._bar.stop()
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, saved in self._saved.items():
            os.dup2(saved, descriptor)
            os.close(saved)
        if error is not None:
            self._out.write(self.noise_since(0))
        self._out.close()
        self._log.close()

    def expect(self, total: int) -> None:
        """So many types will be proven."""
        self.total = total
        self._bar.update(self._task, total=total)

    def mark(self) -> int:
        """Where the noise of what starts now begins."""
        return os.fstat(self._log.fileno()).st_size

    def noise_since(self, mark: int) -> str:
        """The last of what was written since `mark`, by what ran meanwhile."""
        end = self.mark()
        start = max(mark, end - _MOST_CHARACTERS)
        return os.pread(self._log.fileno(), end - start, start).decode(errors="replace")

    def advance(self, name: str) -> None:
        """One more type is proven."""
        self.done += 1
        self._bar.update(self._task, advance=1, description=name)
        if self._bar.disable and (self.done % EVERY == 0 or self.done == self.total):
            self._out.write(f"{self.done:>4} of {self.total}, the last is {name}\n")

    def fail(self, messages: list[str], mark: int) -> None:
        """Say what failed, below it what was written since `mark`."""
        noise = self.noise_since(mark).rstrip()
        lines = [f"FAILED: {message}" for message in messages] + [f"    {line}" for line in noise.splitlines()]
        self._console.print("\n".join(lines), markup=False)

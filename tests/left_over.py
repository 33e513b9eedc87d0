"""Fails a run of the tests that left something in the clone: tests write into pytest's temporary folders.

`build/` and the caches of Python and of the tools are no findings; everything else that was not there when the run
began is, empty folders and files that git ignores included. With pytest-xdist the process that started the workers
looks, once.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


_CACHES = {".git", "__pycache__", "build", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
_SHOWN = 20


def paths_in(root: Path) -> set[str]:
    """All files and folders under `root`, less caches and environments."""
    found: set[str] = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _is_cache(name)]
        found |= {os.path.relpath(os.path.join(folder, name), root) for name in (*folders, *files)}
    return found


def _is_cache(name: str) -> bool:
    return name in _CACHES or name.startswith(".venv") or name.endswith(".egg-info")


class LeftOver:
    """The plugin; `tests/conftest.py` registers it.

    Args:
        root (`Path`): the clone.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.before, self.new = root, paths_in(root), []

    def pytest_sessionfinish(self, session) -> None:
        new = paths_in(self.root) - self.before
        self.new = sorted(path for path in new if os.path.dirname(path) not in new)
        if self.new and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.new:
            terminalreporter.section("left in the clone", red=True, bold=True)
            for path in self.new[:_SHOWN]:
                terminalreporter.line(f"ERROR {path}: new since the tests began; write into `tmp_path`")

"""Where the system is another one: modules that only POSIX has are not needed, and what cannot run says so."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import hf_longctx
from hf_longctx.planner.measure import free_bytes
from hf_longctx.proof.ranks import start_interpreter
from hf_longctx.reporting.meter import cpu_memory
from hf_longctx.resilience.checkpoint_record import sync


ONLY_POSIX = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "syslog", "posix"}


def test_no_module_imports_what_only_posix_has():
    found = []
    for path in sorted(Path(hf_longctx.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tried = {child for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if node not in tried and ONLY_POSIX & {name.partition(".")[0] for name in names}:
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_memory_of_the_process_without_the_module_of_posix(monkeypatch):
    here = cpu_memory()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 0.2 * here < cpu_memory() <= 1.5 * here
    assert free_bytes("cpu") > 2**20


def test_windows_is_told_that_verify_does_not_run_there(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(NotImplementedError, match="which Windows cannot: run it in WSL, on Linux or on macOS"):
        start_interpreter(None)
    sync([Path("there is no such file")])  # nothing is opened

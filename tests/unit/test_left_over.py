"""A run of the tests that leaves something in the clone fails and says what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.left_over import LeftOver


ROOT = Path(__file__).parents[2]
CONFTEST = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.left_over import LeftOver

def pytest_configure(config):
    config.pluginmanager.register(LeftOver(Path(__file__).parent))
"""


TESTS = """
from pathlib import Path
def test_that_writes():
    Path("unused_folder/runs").mkdir(parents=True)
    Path("known/new.txt").touch()
    Path("out.log").touch()
    Path("build/raises").mkdir(parents=True)
"""


def test_what_a_test_leaves_fails_the_run_and_is_named(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST.format(root=str(ROOT)))
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "known").mkdir()
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "left in the clone" in done.stdout
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ERROR ")]
    assert found == ["known/new.txt:", "out.log:", "unused_folder:"]


def test_caches_and_what_was_there_are_no_findings(tmp_path):
    (tmp_path / "notes.txt").touch()
    plugin = LeftOver(tmp_path)
    for name in ("build/raises", "hf_longctx/__pycache__", ".venv-floor/lib", "hf_longctx.egg-info", ".pytest_cache"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("changed")
    session = SimpleNamespace(exitstatus=0)
    plugin.pytest_sessionfinish(session)
    assert plugin.new == ["hf_longctx"] and session.exitstatus == 1  # the folder itself was not there
    (tmp_path / "hf_longctx/__pycache__").rmdir()
    (tmp_path / "hf_longctx").rmdir()
    session.exitstatus = 0
    plugin.pytest_sessionfinish(session)
    assert plugin.new == [] and session.exitstatus == 0

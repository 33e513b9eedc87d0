"""Shared fixtures: one world per size and session."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

from . import raises


raises.install()  # before anything of the package is imported
from hf_longctx.proof.ranks import Imports  # noqa: E402

from .harness import World  # noqa: E402
from .left_over import LeftOver  # noqa: E402


ROOT = Path(__file__).parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / "build" / "hypothesis"))
_WORLDS: dict[int, World] = {}
_IMPORTS = Imports()


def world_of(size: int) -> World:
    return _WORLDS.setdefault(size, World(size))


@pytest.fixture(scope="session")
def only_here(request, tmp_path_factory):
    """No other worker of pytest-xdist starts ranks: worlds would start twice, and more processes share the cores."""
    worker = getattr(request.config, "workerinput", {}).get("workerid")
    if worker is not None:
        file = tmp_path_factory.getbasetemp().parent / "starts_ranks"
        with contextlib.suppress(FileExistsError), open(file, "x") as new:
            new.write(worker)
        assert file.read_text() == worker, "`tests/scheduling.py` did not keep the tests that share ranks together"


@pytest.fixture
def world2(only_here) -> World:
    return world_of(2)


@pytest.fixture
def world4(only_here) -> World:
    return world_of(4)


@pytest.fixture
def worlds(only_here):
    """A function from a size to the session's world of that size."""
    return world_of


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    _IMPORTS.freeze()


def pytest_configure(config) -> None:
    raises.begin_worker(getattr(config, "workerinput", {}).get("workerid", "main"))
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(LeftOver(ROOT))


def pytest_runtest_setup(item) -> None:
    raises.begin_test(item.nodeid)


def pytest_sessionfinish(session, exitstatus) -> None:
    for world in _WORLDS.values():
        world.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from .scheduling import GroupScheduling

    return GroupScheduling(config, log)

"""Shared fixtures: one world per size and session."""

from __future__ import annotations

import os

import pytest
import torch

from . import raises


raises.install()  # before anything of the package is imported
from hf_longctx.proof.ranks import Imports  # noqa: E402

from .harness import World  # noqa: E402


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_WORLDS: dict[int, World] = {}
_IMPORTS = Imports()


def world_of(size: int) -> World:
    return _WORLDS.setdefault(size, World(size))


@pytest.fixture
def world2() -> World:
    return world_of(2)


@pytest.fixture
def world4() -> World:
    return world_of(4)


@pytest.fixture
def worlds():
    """A function from a size to the session's world of that size."""
    return world_of


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    _IMPORTS.freeze()


def pytest_configure(config) -> None:
    raises.begin_worker(getattr(config, "workerinput", {}).get("workerid", "main"))


def pytest_runtest_setup(item) -> None:
    raises.begin_test(item.nodeid)


def pytest_sessionfinish(session, exitstatus) -> None:
    for world in _WORLDS.values():
        world.close()


def pytest_collection_modifyitems(config, items) -> None:
    """With several workers of pytest-xdist, one of them runs all tests that start processes or share a device."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if item.path.parent.name in ("world", "launch", "gpu"):
            item.add_marker(pytest.mark.xdist_group("processes"))

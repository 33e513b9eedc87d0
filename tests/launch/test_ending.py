"""A finished run exits: the process group ends after DDP's reducer, which owns it, and with all its threads."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_longctx import end_training

from ..training import gloo_threads
from .test_recipes import ROOT, TORCHRUN, start


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are read from /proc")


@needs_proc
def test_the_group_of_a_trainer_ends_after_the_wrapper_and_with_its_threads(tmp_path):
    done = start(*TORCHRUN, str(Path(__file__).with_name("ending_rank.py")), str(tmp_path))
    assert done.returncode == 0, done.stderr[-5000:]


@needs_proc
def test_a_loop_of_ones_own_ends_though_its_wrapper_is_held(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    model = DistributedDataParallel(torch.nn.Linear(3, 3))
    model(torch.ones(2, 3)).sum().backward()
    assert gloo_threads() > 0
    end_training(model)
    assert not dist.is_initialized() and "reducer" not in vars(model) and "logger" not in vars(model)
    assert model.module.weight.grad is not None
    del model  # it was the last to hold the group, and no longer through C++
    assert gloo_threads() == 0


def test_without_a_process_group_nothing_happens():
    end_training(torch.nn.Linear(3, 3))
    assert not dist.is_initialized()


SCRIPTS = sorted([*(ROOT / "hf_longctx").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
# Scripts that wrap no model, and ranks that meet anew and collect what is left before they do.
OWN_ENDS = {"recipes/bench/ulysses_worker.py", "recipes/bench/stsb.py", "hf_longctx/proof/ranks.py"}


def test_every_script_that_trains_ends_its_groups_by_end_training():
    ends = re.compile(r"\b(?:accelerator\.end_training|destroy_process_group)\(")
    users = {path.relative_to(ROOT).as_posix() for path in SCRIPTS if ends.search(path.read_text(encoding="utf-8"))}
    assert users == {"hf_longctx/trainer/ending.py", *OWN_ENDS}

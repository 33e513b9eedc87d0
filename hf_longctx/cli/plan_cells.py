"""The simulations of `hf-longctx plan`, on all cores: each preset on each number of GPUs a row is one task.

Workers are forks of this process, which has imported everything and made the model; what they simulated comes back
into the planner, so that nothing is simulated twice. Where forks are not safe, or there is one core, tasks run here.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from ..planner.memory_plan import Planner


# What a worker inherits: a function and the planner whose simulations it adds to.
_inherited: dict[str, Any] = {}


def num_workers(num_tasks: int) -> int:
    """How many processes simulate; 1 where this one does."""
    if sys.platform != "linux" or torch.cuda.is_initialized():
        return 1
    return min(num_tasks, len(os.sched_getaffinity(0)))


def plan_all(
    planner: Planner, plan: Callable[[Any], Any], tasks: Sequence[Any], tell: Callable[[int], None], workers: int
) -> list[Any]:
    """`plan(task)` of every task, in order.

    Args:
        planner ([`Planner`]): the one that `plan` uses; it gets what the workers simulated.
        plan (`Callable`): pure, but for the simulations that the planner keeps.
        tasks (`Sequence`): what it is called with.
        tell (`Callable`): called with the number of finished tasks.
        workers (`int`): see [`num_workers`].
    """
    if workers > 1:
        try:
            return _in_workers(planner, plan, tasks, tell, workers)
        except BrokenProcessPool:  # a worker was killed, as where memory is short: one process needs less
            pass
    found = []
    for number, task in enumerate(tasks):
        tell(number)
        found.append(plan(task))
    return found


def _in_workers(
    planner: Planner, plan: Callable[[Any], Any], tasks: Sequence[Any], tell: Callable[[int], None], workers: int
) -> list[Any]:
    _inherited.update(planner=planner, plan=plan)
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
            waiting = {pool.submit(_work, task): number for number, task in enumerate(tasks)}
            found: list[Any] = [None] * len(tasks)
            for done, future in enumerate(as_completed(waiting), 1):
                found[waiting[future]], simulated = future.result()
                planner.simulated.update(simulated)
                tell(done)
    finally:
        _inherited.clear()
    return found


def _work(task: Any) -> tuple[Any, dict]:
    torch.set_num_threads(1)
    planner = _inherited["planner"]
    known = set(planner.simulated)
    found = _inherited["plan"](task)
    return found, {settings: peaks for settings, peaks in planner.simulated.items() if settings not in known}

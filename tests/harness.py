"""The worlds of the tests: local ranks that are forked from a process which imports what they need, once a session,
and does nothing else. A start costs little then, and they share what is imported.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable

from hf_longctx.proof.ranks import Limits, Ranks, RanksError, serve


# A rank that waits for one that raised gives up, and says where it waited, before the grace is over.
LIMITS = Limits(call=180, grace=75, collective=60)
_CONTEXT = multiprocessing.get_context("forkserver")


class World(Ranks):
    """Local ranks that start when they are first used, and that take and return tensors too."""

    def __init__(self, size: int, limits: Limits = LIMITS) -> None:
        super().__init__(size, start=start_fork, limits=limits)

    def run(self, function: Callable, *args, seconds: float | None = None) -> list:
        """Call `function(*args)` on every rank."""
        try:
            return _read(super().run(_call, pickle.dumps((function, args)), seconds=seconds))
        except RanksError as error:
            error.answers = _read(error.answers)
            raise


def _read(answers: list[bytes | None]) -> list:
    return [None if answer is None else pickle.loads(answer) for answer in answers]


def _call(message: bytes) -> bytes:
    """In bytes, since a pipe would share the memory of tensors with a process that may end."""
    function, args = pickle.loads(message)
    return pickle.dumps(function(*args))


def start_fork(pipe, *place) -> ForkedRank:
    """Fork a rank from the process that has imported `tests.preload`."""
    _CONTEXT.set_forkserver_preload(["tests.preload"])
    process = ForkedRank(target=_serve, args=(pipe, *place))
    process.start()
    return process


class ForkedRank(_CONTEXT.Process):
    """With the exit code from `wait()`, as `subprocess.Popen` has it."""

    def wait(self) -> int | None:
        self.join()
        return self.exitcode


def _serve(pipe, *place) -> None:
    # As a launcher sets them.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    serve(pipe, *place)

"""The worlds of the tests: local ranks that are forked from a process which imports what they need, once a session,
and does nothing else. A start costs little then, and they share what is imported.
"""

from __future__ import annotations

import multiprocessing
import os

from hf_longctx.proof.ranks import Limits, Ranks, serve


# A rank that waits for one that raised gives up, and says where it waited, before the grace is over.
LIMITS = Limits(call=180, grace=75, collective=60)
_CONTEXT = multiprocessing.get_context("forkserver")


def make_world(size: int) -> Ranks:
    """A world that starts when it is first used."""
    return Ranks(size, start=start_fork, limits=LIMITS)


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

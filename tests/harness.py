"""A gloo world of real processes that lives for the whole pytest session; functions are sent to it by name.

Ranks are forked from a process that imports what they need, once a session, and does nothing else. Every rank runs one
thread, meets the others through a file (no ports), and waits at most `TIMEOUT` for a collective. If any rank raises,
the test fails with the tracebacks of all ranks; unless all of them raised, the world is started anew. Groups that
tests made are dropped now and then: gloo wakes each of them a hundred times a second, and hundreds take whole cores.
"""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import sys
import tempfile
import traceback
from datetime import timedelta

import torch.multiprocessing as multiprocessing


TIMEOUT = timedelta(seconds=60)  # also covers the start, when all processes import torch at once
CALLS_A_MEETING = 3  # meeting anew takes some 50 ms


class Imports:
    """Takes what imports have left out of the garbage collector's sight.

    The host collects after every training run, and would walk all the modules of torch and transformers each time:
    three quarters of a tiny run. What a test itself leaves is collected as ever.
    """

    _MANY = 50
    frozen = 0

    def freeze(self) -> None:
        """Call this now and then; most calls do nothing."""
        if len(sys.modules) - self.frozen > self._MANY:
            gc.collect()
            gc.freeze()
            self.frozen = len(sys.modules)


class WorldFailure(AssertionError):
    """At least one rank raised; the message holds every rank's traceback."""


class World:
    """`size` processes joined by gloo."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes, self._pipes = [], []

    def run(self, function, *args, seconds: float = 180):
        """Call `function(*args)` on every rank and return the results in rank order."""
        if not self._processes:
            self._start()
        message = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        results, failures, healthy = [], [], True
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                failures.append(f"rank {rank}: no answer within {seconds} s")
                healthy = False
                continue
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = False, f"process ended with exit code {self._processes[rank].exitcode}"
                healthy = False
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            # When every rank raised and answered, as all do on bad input, none waits for another: the world lives on.
            if not healthy or len(failures) < self.size:
                self.close()
            raise WorldFailure("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        folder = tempfile.mkdtemp()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, folder, rank, self.size), daemon=False)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe, folder: str, rank: int, size: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), OMP_NUM_THREADS="1"
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    imports = Imports()
    for call in itertools.count():
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if call % CALLS_A_MEETING == 0:
            if dist.is_initialized():
                gc.collect()  # a DDP model left in a cycle owns the group: see `end_training`
                dist.destroy_process_group()
            store = f"file://{folder}/{call}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=TIMEOUT)
        imports.freeze()
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))

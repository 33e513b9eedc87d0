"""Processes that wait for work: started without torchrun, joined by gloo through a file, so that no port is needed.

They are fresh interpreters, not forks, and never import the caller's script. One group serves any number of calls; a
group of which a rank raised or fell silent is started anew.
Price: importing torch and transformers once a rank.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path


_SERVE = "import sys; from hf_longctx.proof.ranks import serve; serve(*map(int, sys.argv[1:5]), sys.argv[5])"
_START_SECONDS = 300.0
# After the first rank has answered, how long the others may take.
_GRACE_SECONDS = 60.0
_TICK = 0.2


class RanksError(RuntimeError):
    """A rank raised, ended or fell silent; `answers` holds what others said, in rank order, else `None`."""

    def __init__(self, message: str, answers: list) -> None:
        super().__init__(message)
        self.answers = answers


class Ranks:
    """`size` processes, used as a context manager.

    Args:
        size (`int`): how many; rank and size are those of `torch.distributed`.
        threads (`int`, *optional*, defaults to 1): of torch in each.
    """

    def __init__(self, size: int, threads: int = 1) -> None:
        self.size, self.threads = size, threads
        self._processes: list[subprocess.Popen] = []
        self._pipes: list[connection.Connection] = []
        self._folder: str | None = None
        self._ready = False

    def __enter__(self) -> Ranks:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes; they load in the background."""
        if self._processes:
            return
        self._folder = tempfile.mkdtemp(prefix="hf_longctx_")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        environment["OMP_NUM_THREADS"] = str(self.threads)
        for rank in range(self.size):
            ours, theirs = connection.Pipe()
            numbers = [str(number) for number in (theirs.fileno(), rank, self.size, self.threads)]
            command = [sys.executable, "-c", _SERVE, *numbers, str(Path(self._folder, "store"))]
            process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable, *args, seconds: float = 600.0) -> list:
        """Call `function(*args)` on every rank.

        Args:
            function (`Callable`): importable in a fresh interpreter.
            args: and what it returns: anything that a pipe of `multiprocessing` carries, but no tensors.
            seconds (`float`): time limit. Time in which this process itself was stopped does not count.

        Returns:
            `list`: what each rank returned.

        Raises:
            RanksError: a rank raised, ended or took too long. The processes are gone then; the next call starts anew.
        """
        self.start()
        if not self._ready:
            self._collect(_START_SECONDS, starting=True)
            self._ready = True
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._collect(seconds)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._folder, self._ready = [], [], None, False

    def _collect(self, seconds: float, starting: bool = False) -> list:
        answers, failures = [None] * self.size, {}
        waiting, left = dict(enumerate(self._pipes)), seconds
        while waiting and left > 0:
            began = time.monotonic()
            for pipe in connection.wait(list(waiting.values()), timeout=_TICK):
                rank = self._pipes.index(pipe)
                del waiting[rank]
                try:
                    ok, value = pipe.recv()
                except (EOFError, ConnectionError):
                    ok, value = False, f"the process ended (exit code {self._processes[rank].wait()})"
                if ok:
                    answers[rank] = value
                else:
                    failures[rank] = value
                if not starting:
                    left = min(left, _GRACE_SECONDS)
            left -= min(time.monotonic() - began, 2 * _TICK)  # a machine that slept does not use up the time
        failures |= {rank: "no answer in time" for rank in waiting}
        if failures:
            self.close()
            raise RanksError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())), answers)
        return answers


def serve(descriptor: int, rank: int, size: int, threads: int, store: str) -> None:
    """What a rank does: join the others, then run what it is sent until the pipe closes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    pipe = connection.Connection(descriptor)
    try:
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        from . import compare  # noqa: F401  what every call needs, loaded while the parent reads its configuration

        torch.set_num_threads(threads)
        if size > 1:
            # The parent watches the clock; here a rank that is late is no error.
            limits = {"timeout": timedelta(hours=2)}
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, **limits)
        answer = (True, None)
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    while answer[0]:
        try:
            function, args = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = (True, function(*args))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            continue
        pipe.send(answer)

"""Local ranks: processes that wait for work, joined by gloo through a file; no torchrun and no port is needed.

`verify` and the sweeps start fresh interpreters, which never import the caller's script. The tests pass another way to
start. Everything else is the same: one group serves any number of calls, meets anew every few of them, and is started
anew after a rank fell.
Price: importing torch and transformers once a rank.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Protocol


_SERVE = (
    "import json, sys; from multiprocessing.connection import Connection; from hf_longctx.proof.ranks import serve; "
    "descriptor, *place = json.loads(sys.argv[1]); serve(Connection(descriptor), *place)"
)
# A call leaves the groups that it made, and gloo wakes each of them a hundred times a second: hundreds take whole
# cores. Meeting anew ends them all, in some 50 ms.
_CALLS_A_MEETING = 3
_NEW_MODULES = 50
_TICK = 0.2


class RanksError(RuntimeError):
    """A rank raised, ended or stopped responding; `answers` holds the others' results, in rank order, else `None`."""

    def __init__(self, message: str, answers: list) -> None:
        super().__init__(message)
        self.answers = answers


@dataclass(frozen=True)
class Limits:
    """Seconds that ranks may take.

    Args:
        start (`float`, *optional*, defaults to 300): until all have loaded what they need.
        call (`float`, *optional*, defaults to 600): until all have answered.
        grace (`float`, *optional*, defaults to 60): for the others, once one has answered.
        collective (`float`, *optional*, defaults to 7200): for one collective. With more than `grace`, a rank that
            waits for one that raised is ended by this process and does not raise itself.
    """

    start: float = 300.0
    call: float = 600.0
    grace: float = 60.0
    collective: float = 7200.0


class Rank(Protocol):
    """A process, as far as [`Ranks`] needs one; `subprocess.Popen` is such."""

    def kill(self) -> None: ...

    def wait(self) -> int: ...


def start_interpreter(pipe: Connection, *place) -> subprocess.Popen:
    """Start a fresh interpreter that calls `serve(pipe, *place)`.

    Raises:
        NotImplementedError: on Windows, where a pipe has no number that another process could open.
    """
    if sys.platform == "win32":
        raise NotImplementedError(
            "`verify` hands pipes to its processes by their number, which Windows cannot: run it in WSL, on Linux or "
            "on macOS."
        )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = [sys.executable, "-c", _SERVE, json.dumps([pipe.fileno(), *place])]
    return subprocess.Popen(command, env=environment, pass_fds=[pipe.fileno()], stdin=subprocess.DEVNULL)


class Ranks:
    """`size` processes, used as a context manager or closed by hand.

    Args:
        size (`int`): how many; rank and size are those of `torch.distributed`.
        threads (`int`, *optional*, defaults to 1): of torch in each.
        start (`Callable`, *optional*): from a pipe and what follows it to a running process that calls `serve` with
            them; by default a fresh interpreter.
        limits ([`Limits`], *optional*): how long they may take.
    """

    def __init__(
        self,
        size: int,
        threads: int = 1,
        start: Callable[..., Rank] = start_interpreter,
        limits: Limits = Limits(),
    ) -> None:
        self.size, self.threads, self.limits = size, threads, limits
        self._start_rank = start
        self._processes: list[Rank] = []
        self._pipes: list[Connection] = []
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
        for rank in range(self.size):
            ours, theirs = Pipe()
            place = (rank, self.size, self.threads, self._folder, self.limits.collective)
            self._processes.append(self._start_rank(theirs, *place))
            theirs.close()
            self._pipes.append(ours)

    def run(self, function: Callable, *args, seconds: float | None = None) -> list:
        """Call `function(*args)` on every rank.

        Args:
            function (`Callable`): importable where the ranks run.
            args: and what it returns: anything that a pipe of `multiprocessing` carries, but no tensors.
            seconds (`float`, *optional*): time limit, instead of `limits.call`. Time in which this process itself was
                stopped does not count.

        Returns:
            `list`: what each rank returned.

        Raises:
            RanksError: a rank raised, ended or took too long. Unless every rank raised, as all do on bad input, the
                processes are gone then, and the next call starts anew.
        """
        self.start()
        if not self._ready:
            self._collect(self.limits.start)
            self._ready = True
        for pipe in self._pipes:
            with contextlib.suppress(ConnectionError):  # a rank that has ended meanwhile is reported below
                pipe.send((function, args))
        return self._collect(self.limits.call if seconds is None else seconds)

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

    def _collect(self, seconds: float) -> list:
        """What every rank answers to what it was sent."""
        answers: list[Any] = [None] * self.size
        failures: dict[int, Any] = {}
        waiting = dict(enumerate(self._pipes))
        left, one_ended, lives_on = seconds, False, False
        try:
            while waiting and left > 0:
                began = time.monotonic()
                ready: list[Any] = wait(list(waiting.values()), timeout=_TICK)
                for pipe in ready:
                    rank = self._pipes.index(pipe)
                    del waiting[rank]
                    try:
                        ok, value = pipe.recv()
                    except (EOFError, ConnectionError):
                        ok, value = False, f"the process ended (exit code {self._processes[rank].wait()})"
                        one_ended = True
                    if ok:
                        answers[rank] = value
                    else:
                        failures[rank] = value
                    if self._ready:
                        left = min(left, self.limits.grace)
                left -= min(time.monotonic() - began, 2 * _TICK)  # a machine that slept does not use up the time
            failures |= {rank: "no answer in time" for rank in waiting}
            # When all raised, none waits for another in a collective.
            all_raised = self._ready and len(failures) == self.size and not waiting and not one_ended
            lives_on = not failures or all_raised
        finally:
            if not lives_on:
                self.close()
        if failures:
            raise RanksError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())), answers)
        return answers


class Imports:
    """Takes what imports have left out of the garbage collector's sight.

    transformers collects after every training run, and would walk all the modules of torch and its own each time:
    three quarters of a tiny run. What a call itself leaves is collected as ever.
    """

    _frozen = 0

    def freeze(self) -> None:
        """Call this now and then; most calls do nothing."""
        if len(sys.modules) - self._frozen > _NEW_MODULES:
            gc.collect()
            gc.freeze()
            self._frozen = len(sys.modules)


def serve(pipe: Connection, rank: int, size: int, threads: int, folder: str, collective_seconds: float) -> None:
    """What a rank does: load, then run what it is sent until the pipe closes."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(number) for name, number in (numbers | {"OMP_NUM_THREADS": threads}).items()})
    imports = Imports()

    def run(call: int, function: Callable, *args):
        if size > 1 and call % _CALLS_A_MEETING == 0:
            _meet(f"file://{folder}/{call}", rank, size, collective_seconds)
        imports.freeze()
        return function(*args)

    _answer(pipe, _load, threads)
    for call in itertools.count():
        try:
            function, args = pipe.recv()
        except (EOFError, ConnectionError):
            return
        _answer(pipe, run, call, function, *args)


def _answer(pipe: Connection, function: Callable, *args) -> None:
    """Send what a call returned, or its traceback."""
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _load(threads: int) -> None:
    """Import what every call needs, while the parent reads its configuration."""
    import torch

    from . import compare  # noqa: F401

    torch.set_num_threads(threads)


def _meet(store: str, rank: int, size: int, seconds: float) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        gc.collect()  # a DDP model that a call left in a cycle owns the group
        dist.destroy_process_group()
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)

"""The processes of `packing.py`: one `packing_worker.py` a variant, which answers one command at a time."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packing_worker import ANSWER, Worker
from processes import in_one_process, measure_here


WORKER = Path(__file__).with_name("packing_worker.py")


class WorkerProcess:
    """A running `packing_worker.py`; what it prints to its standard error goes to a file."""

    def __init__(self, settings: dict, log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        with open(log, "w") as errors:
            command = [sys.executable, str(WORKER), json.dumps(settings)]
            self.process = subprocess.Popen(command, stderr=errors, **pipes)

    def ask(self, command: str) -> dict:
        """Its answer to a command, or `{"failed": why}`."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        lines = self.log.read_text().strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit code {self.process.wait()} without a word"}

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class WorkerHere:
    """A variant in this process: on CUDA, where the allocator tells what it takes."""

    def __init__(self, settings: dict) -> None:
        self.settings, self.worker = settings, None

    def ask(self, command: str) -> dict:
        """Its answer to a command, or `{"failed": why}`."""
        return measure_here(self._answer, {"command": command})

    def _answer(self, question: dict) -> dict:
        if self.worker is None:
            self.worker = Worker(self.settings)
        return getattr(self.worker, question["command"])()

    def close(self) -> None:
        self.worker = None


@contextlib.contextmanager
def start_workers(variants: list, shape: dict, args: argparse.Namespace, folder: Path) -> Iterator[list]:
    """One process a variant, all at once, ended together; on CUDA all in this one."""
    workers = []
    try:
        for index, variant in enumerate(variants):
            settings = {
                "attention": variant.attention,
                "shape": shape,
                "device": args.device,
                "dtype": args.dtype,
                "threads": args.threads,
                "batches": str(folder / f"{variant.collation}.pt"),
                "reference": str(folder / "reference.pt"),
            }
            here = in_one_process(args)
            workers.append(WorkerHere(settings) if here else WorkerProcess(settings, folder / f"{index}.log"))
        yield workers
    finally:
        for worker in workers:
            worker.close()

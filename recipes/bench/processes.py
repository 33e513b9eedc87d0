"""Where a measurement runs: in a fresh process, or in this one.

On a CPU the memory of a step is that of its process, so each measurement gets a process. On CUDA the allocator counts
the bytes of every step by itself, and a process would spend most of its seconds on loading libraries: there the
measurements of a benchmark run in one process, one after another. `--one_process` asks for the same on a CPU, where
the figures of memory then mean little; it is for trying the code.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch


NO_TIME = "no time left"


def run_worker(script: str | Path, settings: dict, cores: int, label: str, gives_back: bool = False) -> dict:
    """What `script --worker SETTINGS` prints last, from a fresh process; an error with `label` if it fails.

    With `gives_back`, tensors that are freed are given back to the system at once, as an allocator of CUDA would reuse
    them, so that the high-water mark is that of what was held.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"} if gives_back else {}
    command = [sys.executable, str(script), "--worker", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{label} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def add_one_process(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--one_process", action="store_true", help="measure all in this process, as is always done on CUDA"
    )


def in_one_process(args: argparse.Namespace) -> bool:
    return args.one_process or args.device == "cuda"


def measure_here(measure: Callable[[dict], dict], settings: dict) -> dict:
    """`measure(settings)` in this process, or `{"failed": why}`; the device's memory is given back after it."""
    try:
        result = measure(settings)
    except torch.cuda.OutOfMemoryError:
        result = {"failed": "out of memory"}
    except Exception as error:  # the other measurements of the run do not depend on this one
        lines = str(error).strip().splitlines() or [""]
        result = {"failed": f"{type(error).__name__}: {lines[0]}"}
    # Here the error is gone, and with it the frames that held tensors.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return result

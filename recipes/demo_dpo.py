"""Preferences: a small model learns to answer from its text instead of guessing, then one process repeats the run.

    python recipes/demo_dpo.py

A text says which crate is in which hall. The preferred answer names the hall that the text names, the rejected one
guesses another. SmolLM2-135M learns from such pairs (DPO with LoRA, so that the reference is the model itself), each
row shared by two processes on the CPU; pairs that it never saw tell how often it gives the preferred answer the larger
reward. One process then repeats the steps on whole rows, and both columns of losses and both accuracies are printed.

Everything goes to `runs/demo-dpo/`, which this script owns and replaces; it needs no network. The exit code is 1 if
losses differ, or if fewer than 90 % of the held-out pairs are right.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from demo import ROOT, TOLERANCE, compare, run
from rich.console import Console
from transformers import HfArgumentParser


COLORS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink")
ACCURACY = "eval_rewards/accuracies"


@dataclass
class DemoArguments:
    steps: int = field(default=12, metadata={"help": "Optimizer steps, by two processes and by one."})
    num_pairs: int = field(default=80, metadata={"help": "Pairs to write; the YAML says how many are held out."})
    crates: int = field(default=2, metadata={"help": "Crates in a text: more of them make longer rows."})
    least_accuracy: float = field(default=0.9, metadata={"help": "Share of held-out pairs that must be right."})
    config: str = field(default="recipes/dpo_smollm2_halls.yaml", metadata={"help": "YAML file of the run."})
    folder: str = field(default="runs/demo-dpo", metadata={"help": "Where to write; replaced."})


def pair_of(index: int, crates: int) -> dict[str, str]:
    """A text with a question, the answer that the text gives and one that it does not, drawn by a number."""
    draw = random.Random(index)
    colors, halls = draw.sample(COLORS, crates), draw.sample(range(1, 10), crates)
    facts = " ".join(f"The {color} crate is in hall {hall} ." for color, hall in zip(colors, halls))
    asked = draw.randrange(crates)
    wrong = draw.choice([hall for hall in range(1, 10) if hall != halls[asked]])
    return {
        "prompt": f"{facts} Where is the {colors[asked]} crate ?",
        "chosen": f" It is in hall {halls[asked]} .",
        "rejected": f" I would guess that it may be in hall {wrong} .",
    }


def write_pairs(path: Path, count: int, crates: int) -> None:
    """So many of them, as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(pair_of(index, crates)) + "\n" for index in range(count)))


def main() -> int:
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    console, started = Console(), time.perf_counter()
    folder = ROOT / arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    write_pairs(folder / "pairs.jsonl", arguments.num_pairs, arguments.crates)
    steps = [str(arguments.steps)] * 2
    recipe = ["recipes/dpo.py", "--config", arguments.config, "--dataset_name", str(folder / "pairs.jsonl")]
    recipe += ["--max_steps", steps[0], "--eval_strategy", "steps", "--eval_steps", steps[1]]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shared, alone = folder / "shared", folder / "one_process"
    run([*torchrun, *recipe, "--output_dir", str(shared)], 1, console)
    run([*recipe, "--sequence_parallel_size", "1", "--output_dir", str(alone)], os.cpu_count(), console)

    console.rule("Result")
    found = [json.loads((path / "metrics.json").read_text()) for path in (shared, alone)]
    largest = compare(console, *found, "nats per pair")
    accuracies = [metrics["eval_history"][-1][ACCURACY] for metrics in found]
    right = min(accuracies) >= arguments.least_accuracy
    equal = largest <= TOLERANCE and abs(accuracies[0] - accuracies[1]) <= TOLERANCE
    console.print(
        f"Held-out pairs on which the preferred answer has the larger reward, after {arguments.steps} steps: "
        f"{accuracies[0]:.1%} on two processes, {accuracies[1]:.1%} on one."
    )
    console.print(
        f"Losses are {'[green]equal[/green]' if equal else '[red]not equal[/red]'}: two processes against one "
        f"{largest:.1e}, allowed {TOLERANCE:.0e}."
    )
    console.print(f"Model card: {shared}/README.md\nSeconds: {time.perf_counter() - started:.0f}")
    return 0 if equal and right else 1


if __name__ == "__main__":
    sys.exit(main())

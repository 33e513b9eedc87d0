"""Memory and seconds of one training step with every preset of `MemoryConfig(memory=...)`, alone and sharded.

What: whole steps of `LongContextTrainer` on a Llama with random weights, one row a step, in rows of several lengths.
From the lines through them follows the longest row that a given memory holds. On a CPU `"max"` is left out, since
checkpoints are in CPU memory already.

How: every measurement is a run of its own (`memory_presets_worker.py`); of all presets the loss and gradient norm
must be those of the first. Memory is the high-water mark of the step less what the process held before it, with
weights, optimizer state and libraries: gradients, activations, logits and temporaries. Price: on 2 cores, some 15
minutes and 10 GB at the defaults.

    python recipes/bench/memory_presets.py --output docs/benchmarks/memory_presets_cpu.md
    python recipes/bench/memory_presets.py --device cuda --hidden 4096 --output docs/benchmarks/memory_presets_cuda.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from memory_presets_report import page_of, summarize
from page import describe_run, finish
from processes import NO_TIME, add_one_process, in_one_process, measure_here
from rich.console import Console


WORKER = Path(__file__).with_name("memory_presets_worker.py")
# Of loss and gradient norm, in the six and more digits that the trainer logs; sums in another order move the last.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2**-6}
console = Console(width=max(Console().width, 120))


@dataclass(frozen=True)
class Case:
    """One line of the picture."""

    memory: str
    ranks: int

    @property
    def label(self) -> str:
        return f'"{self.memory}"' + (f", {self.ranks} ranks" if self.ranks > 1 else "")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="row lengths")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, help="width of the MLP (default: 4 times `hidden`)")
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--budget", type=float, default=4, help="GB of a step, for the longest row")
    parser.add_argument("--ranks", type=int, default=2, help="processes that share a row in the sharded runs")
    parser.add_argument("--presets", nargs="+", metavar="PRESET", help="by default all that differ on the device")
    parser.add_argument("--kv_heads", type=int, help="key/value heads (default: half of the query heads)")
    parser.add_argument("--reversible_lsh", action="store_true", help="LSH attention in reversible layers instead")
    parser.add_argument("--plan", action="store_true", help="the planner's prediction next to each measurement")
    parser.add_argument("--minutes", type=float, default=120, help="on CUDA, start no further measurement after it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_one_process(parser)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="cores that every run shares out")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json and a .png are written next to it")
    args = parser.parse_args(arguments)
    args.intermediate = args.intermediate or 4 * args.hidden
    args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    if args.one_process and args.ranks > 1:
        raise ValueError(f"`ranks` ({args.ranks}) must be 1 in one process: pass `--ranks 1`.")
    if len(set(args.tokens)) < 2 and not in_one_process(args):
        raise ValueError(f"`tokens` ({args.tokens}) must be two lengths or more: a line goes through two points.")
    return args


def list_cases(args: argparse.Namespace) -> list[Case]:
    """From the first to the last; the first is what the others must equal."""
    names = args.presets or ["off", "loss", "mlp", "checkpoint", *(["max"] if args.device == "cuda" else [])]
    sharded = [Case("off", args.ranks), Case(names[-1], args.ranks)] if args.ranks > 1 else []
    return [Case(name, 1) for name in names] + sharded


def run_once(preset: Case, tokens: int, args: argparse.Namespace, folder: Path) -> dict:
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    threads = max(1, args.cores // preset.ranks)
    settings = {
        **asdict(preset),
        "tokens": tokens,
        "threads": threads,
        "device": args.device,
        "dtype": args.dtype,
        "plan": args.plan,
        "reversible_lsh": args.reversible_lsh,
        "result": str(result),
        "shape": {
            "vocab_size": args.vocab,
            "hidden_size": args.hidden,
            "intermediate_size": args.intermediate,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.hidden // args.head_size,
            "num_key_value_heads": args.kv_heads or max(1, args.hidden // args.head_size // 2),
            **({"num_key_value_heads": args.hidden // args.head_size} if args.reversible_lsh else {}),
        },
    }
    if in_one_process(args) and preset.ranks == 1:
        import memory_presets_worker

        return measure_here(memory_presets_worker.measure, settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(preset.ranks)]
    command = [sys.executable, *(launcher if preset.ranks > 1 else []), str(WORKER), json.dumps(settings)]
    # Blocks of 64 KiB and more are given back as soon as they are freed, so that the high-water mark is the step's.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not result.exists():
        raise RuntimeError(f"{preset.label} failed at {tokens:,} tokens: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(result.read_text())


def measure_all(args: argparse.Namespace, folder: Path) -> list[dict]:
    """One row per length and preset."""
    rows, deadline = [], time.monotonic() + 60 * args.minutes
    for tokens in sorted(set(args.tokens)):
        expected = None
        for preset in list_cases(args):
            late = in_one_process(args) and time.monotonic() > deadline
            run = {"failed": NO_TIME} if late else run_once(preset, tokens, args, folder)
            facts = {"label": preset.label, **asdict(preset), "tokens": tokens}
            if "failed" in run:  # in one process, where the rest goes on
                rows.append({**facts, "runs": [], "failed": run["failed"]})
                console.print(f"{tokens:,} tokens, {preset.label}: {run['failed']}", highlight=False)
                continue
            expected = expected or run
            errors = {key: abs(run[key] / expected[key] - 1) for key in ("loss", "gradient_norm")}
            if not max(errors.values()) <= TOLERANCE[args.dtype]:
                if not in_one_process(args):
                    raise RuntimeError(f"{preset.label} is wrong at {tokens:,} tokens: {errors}")
                rows.append({**facts, "runs": [], "failed": f"wrong: {errors}"})
                continue
            rows.append({**facts, "runs": [run], "errors": errors})
            console.print(
                f"{tokens:,} tokens, {preset.label}: {run['step_bytes'] / 1e9:.2f} GB, {run['seconds']:.1f} s",
                highlight=False,
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(args, Path(folder))
    packages = ("hf-longctx", "torch", "transformers", "accelerate")
    result = describe_run("memory_presets", arguments, args, packages, rows)
    summarize(result)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

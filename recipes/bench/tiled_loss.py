"""Seconds and peak memory of the loss of one row: whole logits, ours in tiles, TRL's fused head, and Liger's kernel.

What: from hidden states `(T, D)` and the output embedding `(V, D)` to the loss and both gradients. On a CPU in
float32; on CUDA in bfloat16, with Liger where it is installed and torch's `linear_cross_entropy` where torch has it.

How: on a CPU every measurement is a fresh process (`tiled_loss_worker.py`), on CUDA all are in one, and the contenders
take turns within each round. Correctness comes first: loss and gradients of all must equal those of whole logits
before anything is timed. Whole logits are measured only where several copies of them fit the memory. Price: on 2
cores, some 20 minutes at the defaults; `--tokens 2048 4096` takes 3.

    python recipes/bench/tiled_loss.py --output docs/benchmarks/tiled_loss_cpu.md
    python recipes/bench/tiled_loss.py --device cuda --width 4096 --output docs/benchmarks/tiled_loss_cuda.md

Which tile is fastest here:
    python recipes/bench/tiled_loss.py --tokens 4096 --tile_sizes 64 128 256 512 1024 2048

With the metrics that `SFTTrainer` logs:
    python recipes/bench/tiled_loss.py --tokens 4096 --metrics
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from page import describe_run, finish
from processes import NO_TIME, add_one_process, in_one_process, measure_here
from rich.console import Console
from tiled_loss_report import page_of, summarize


WORKER = Path(__file__).with_name("tiled_loss_worker.py")
CHECK_TOKENS = 700  # more than a tile, and no multiple of one
# float32: sums over a vocabulary in another order. bfloat16 keeps 8 bits, and the contenders round at other places.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-6}
UNTILED_COPIES = 4  # logits, their logarithms of softmax, and gradients of both
console = Console(width=max(Console().width, 150))


@dataclass(frozen=True)
class Contender:
    """One column of the comparison."""

    label: str
    name: str
    tile_size: int | None = None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--width", type=int, default=512, help="size of a hidden state, D")
    parser.add_argument("--vocab", type=int, default=131072, help="words, V")
    parser.add_argument("--ignored", type=float, default=0.0, help="the share of labels that are -100")
    parser.add_argument("--tile_sizes", type=int, nargs="+", help="measure ours at these sizes too")
    parser.add_argument("--metrics", action="store_true", help="entropy and top-1 hits as well, as SFTTrainer logs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="threads of every contender")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the table shows their median")
    parser.add_argument("--repeat_up_to", type=int, default=4096, help="longer rows are measured once, last")
    parser.add_argument("--minutes", type=float, default=120, help="start no further round after this time")
    add_one_process(parser)
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json and a .png are written next to it")
    args = parser.parse_args(arguments)
    args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    if not 0 <= args.ignored < 1:
        raise ValueError(
            f"`ignored` ({args.ignored}) must be at least 0 and less than 1: it is a share of the labels."
        )
    if min(args.tokens) < 1:
        raise ValueError(f"`tokens` ({min(args.tokens)}) must be positive: it is the length of a row.")
    return args


def list_contenders(args: argparse.Namespace) -> list[Contender]:
    """Who runs, in this order in every round; the first is the reference."""
    contenders = [Contender("whole logits", "untiled"), Contender("ours", "ours")]
    contenders += [Contender(f"ours, {size:,} a tile", "ours", size) for size in args.tile_sizes or ()]
    if importlib.util.find_spec("trl"):
        contenders.append(Contender("TRL's fused head", "trl"))
    if in_one_process(args) and hasattr(torch.nn.functional, "linear_cross_entropy"):
        contenders.append(Contender("torch's", "torch"))
    if args.device == "cuda" and importlib.util.find_spec("liger_kernel"):
        contenders.append(Contender("Liger's kernel", "liger"))
    if args.metrics:
        contenders.append(Contender("ours, with metrics", "ours_metrics"))
        contenders.append(Contender("TRL's fused head, with metrics", "trl_metrics"))
    return contenders


def whole_logits_fit(args: argparse.Namespace, tokens: int) -> bool:
    """Whether several copies of the logits fit what is free now."""
    if args.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    elif Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return UNTILED_COPIES * 4 * tokens * args.vocab < 0.9 * free


def run_once(contender: Contender, tokens: int, args: argparse.Namespace, folder: Path, compare: bool) -> dict:
    """One measurement in a fresh process: the worker's numbers, or `{"failed": why}`."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    settings = {
        "contender": contender.name,
        "tile_size": contender.tile_size,
        "tokens": tokens,
        "threads": args.cores,
        "reference": str(folder / f"reference-{tokens}.pt") if compare else None,
        "result": str(result),
        **{name: getattr(args, name) for name in ("width", "vocab", "ignored", "device", "dtype")},
    }
    if in_one_process(args):
        import tiled_loss_worker

        return measure_here(tiled_loss_worker.measure, settings)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.cores)}
    command = [sys.executable, str(WORKER), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not result.exists():
        errors = re.findall(r"^((?:\w+\.)*\w*Error: .*)$", done.stderr, re.MULTILINE)
        reason = errors[-1] if errors else (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"failed": "out of memory" if done.returncode == -9 else reason}
    return json.loads(result.read_text())


def check_first(contenders: list[Contender], args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Compare every contender with whole logits on a short row; a wrong one of ours ends the run."""
    checks = {}
    for contender in contenders:
        run = run_once(contender, CHECK_TOKENS, args, folder, compare=True)
        if "failed" in run and (contender.name.startswith(("untiled", "ours")) or not in_one_process(args)):
            raise RuntimeError(f"{contender.label} failed on {CHECK_TOKENS} tokens: {run['failed']}")
        if "failed" in run:  # a peer, without which ours is measured all the same
            checks[contender.label] = {"failed": run["failed"]}
            continue
        if contender.name == "untiled":
            continue
        errors = {key: run[key] for key in ("loss_error", "gradient_error")}
        if contender.name.startswith("ours") and not all(error <= TOLERANCE[args.dtype] for error in errors.values()):
            raise RuntimeError(f"{contender.label} is wrong, so its speed does not matter: {errors}")
        console.print(
            f"{contender.label}: loss off by {errors['loss_error']:.1e}, gradients by {errors['gradient_error']:.1e}"
        )
        checks[contender.label] = errors
    return checks


def measure_all(contenders: list[Contender], args: argparse.Namespace, folder: Path) -> list[dict]:
    """Rounds of every contender on every row, interleaved; one entry a row and contender."""
    deadline = time.monotonic() + 60 * args.minutes
    checks = check_first(contenders, args, folder)
    rows = [
        {"tokens": tokens, **asdict(c), "runs": [], "failed": None, **checks.get(c.label, {})}
        for tokens in sorted(args.tokens)
        for c in contenders
    ]
    long = [row for row in rows if row["tokens"] > args.repeat_up_to]
    short = [row for row in rows if row not in long]
    # Long rows come last and once: they tell memory, which needs no quiet machine.
    for index, chosen in enumerate([short] * args.repeats + [long]):
        if index and chosen is short and time.monotonic() > deadline:
            continue
        for row in chosen:
            if row["failed"]:
                continue
            if row["name"] == "untiled" and not whole_logits_fit(args, row["tokens"]):
                row["failed"] = "does not fit"
                continue
            if in_one_process(args) and time.monotonic() > deadline:
                row["failed"] = None if row["runs"] else NO_TIME
                continue
            contender = Contender(row["label"], row["name"], row["tile_size"])
            run = run_once(contender, row["tokens"], args, folder, compare=False)
            row["failed"] = run.get("failed")
            if not row["failed"]:
                row["runs"].append(run)
                console.print(f"{row['tokens']:,} tokens: {row['label']}: {run['seconds']:.2f} s", highlight=False)
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    contenders = list_contenders(args)
    packages = ["hf-longctx", "torch", "transformers"]
    packages += [package for package in ("trl", "liger_kernel") if any(c.name == package[:5] for c in contenders)]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(contenders, args, Path(folder))
    summarize(rows, os.cpu_count())
    result = describe_run("tiled_loss", arguments, args, packages, rows) | {"check_tokens": CHECK_TOKENS}
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

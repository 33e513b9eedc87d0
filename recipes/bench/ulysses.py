"""Seconds and peak memory of one training step: one process, `ulysses`, and axolotl-ringmaster, side by side.

What: forward with the causal loss and backward of a Llama with random weights. On a CPU: (a) one process with all
cores and the stock `sdpa`; (b) `attn_implementation="ulysses"` on 2 ranks that share the same cores; (c) with
`--peer_python`, ringmaster's Ulysses on 2 ranks. On CUDA: one rank, the stock kernel against `"ulysses"` and
`"packed"` around it, in bfloat16, all in one process, with the utilization of the device (MFU).

How: every measurement is a fresh process (`ulysses_worker.py`), and the contenders take turns within each round, so a
slow minute of the machine hits all of them. Correctness comes first: losses and all gradients must equal (a) before
anything is timed, and are compared again in every timed run. Price: on 2 cores, some 25 minutes and 9 GB at the
defaults.

    python recipes/bench/ulysses.py --output docs/benchmarks/ulysses_cpu.md
    python recipes/bench/ulysses.py --device cuda --output docs/benchmarks/ulysses_cuda.md

The peer needs an environment of its own:
    python -m venv peer && peer/bin/pip install axolotl-ringmaster==0.2.7 transformers==5.23.0
    python recipes/bench/ulysses.py --peer_python peer/bin/python
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
from importlib.metadata import version
from pathlib import Path

from page import describe_run, finish
from processes import NO_TIME, add_one_process, in_one_process, measure_here
from rich.console import Console
from ulysses_report import page_of, summarize


WORKER = Path(__file__).with_name("ulysses_worker.py")
CHECK_TOKENS = 512
# float32: the project's own promise. bfloat16 keeps 8 bits, and the last one may differ between two orders of a sum.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}
PEER = "axolotl-ringmaster"
OURS = ("ulysses", "packed")
console = Console(width=max(Console().width, 170))


@dataclass(frozen=True)
class Contender:
    """One row of the table: which attention, on how many ranks, in which Python."""

    label: str
    name: str
    kernel: str
    ranks: int
    threads: int
    python: str


@dataclass(frozen=True)
class Case:
    """One model shape at one row length."""

    heads: int
    kv_heads: int
    tokens: int

    @property
    def label(self) -> str:
        return f"{self.heads}/{self.kv_heads} heads, {self.tokens:,} tokens"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="row lengths (CPU: 4096 8192; CUDA: 8192 32768 131072)")
    parser.add_argument("--layers", type=int, default=3, help="SmolLM2-135M has 30; 3 fit the time")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--heads", type=int, nargs="+", default=[9, 8], help="query heads, one entry a shape")
    parser.add_argument("--kv_heads", type=int, nargs="+", default=[3, 4], help="key/value heads of each shape")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, help="processes of ulysses and the peer (CPU: 2; CUDA: 1)")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing, of every contender")
    parser.add_argument("--tiled_loss", action="store_true", help="loss in tiles, of every contender: long rows")
    add_one_process(parser)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="cores that every contender shares out")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the table shows their median")
    parser.add_argument("--minutes", type=float, default=120, help="start no further round after it")
    parser.add_argument("--peer_python", help=f"the Python of an environment with {PEER}; omitted: no such row")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json and a .png are written next to it")
    args = parser.parse_args(arguments)
    on_cpu = args.device == "cpu"
    args.tokens = args.tokens or ([4096, 8192] if on_cpu else [8192, 32768, 131072])
    args.ranks = args.ranks or (2 if on_cpu and not args.one_process else 1)
    args.dtype = "float32" if on_cpu else "bfloat16"
    validate_arguments(args)
    return args


def validate_arguments(args: argparse.Namespace) -> None:
    """Raise before the first process starts what would fail in all of them."""
    if len(args.heads) != len(args.kv_heads):
        raise ValueError(
            f"`heads` ({args.heads}) and `kv_heads` ({args.kv_heads}) must have one entry a shape each: give as many "
            "key/value as query heads."
        )
    if args.one_process and args.ranks > 1:
        raise ValueError(f"`ranks` ({args.ranks}) must be 1 in one process: leave out `--one_process`.")
    if args.device == "cpu" and args.cores % args.ranks:
        raise ValueError(
            f"`ranks` ({args.ranks}) must divide `cores` ({args.cores}), so that every contender has the same cores: "
            "change one of them."
        )
    if min(args.tokens) < CHECK_TOKENS:
        raise ValueError(f"`tokens` ({min(args.tokens)}) must be at least {CHECK_TOKENS}: measure longer rows.")


def list_contenders(args: argparse.Namespace) -> list[Contender]:
    """Who runs, in this order in every round; the first of each kernel is the reference."""
    kernels = ["sdpa"]
    if args.device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        kernels.append("flash_attention_2")
    threads, here = args.cores // args.ranks, sys.executable
    ranks = f"{args.ranks} ranks" if args.ranks > 1 else "1 rank"
    contenders = []
    for kernel in kernels:
        contenders.append(Contender(f"one process, {kernel}", "stock", kernel, 1, args.cores, here))
        contenders.append(Contender(f"ulysses({kernel}), {ranks}", "ulysses", kernel, args.ranks, threads, here))
        if args.ranks == 1 and kernel == "sdpa":
            contenders.append(Contender(f"packed({kernel})", "packed", kernel, 1, args.cores, here))
        if args.peer_python and args.ranks > 1:
            label = f"ringmaster({kernel}), {ranks}"
            contenders.append(Contender(label, "ringmaster", kernel, args.ranks, threads, args.peer_python))
    return contenders


def peer_version(python: str | None) -> str | None:
    """The peer's version in its own environment."""
    if python is None:
        return None
    code = f"import ringmaster, importlib.metadata as m; print(m.version('{PEER}'), m.version('torch'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except FileNotFoundError:
        done = None
    if done is None or done.returncode:
        raise ValueError(
            f"`peer_python` ('{python}') cannot import ringmaster: make an environment with `python -m venv peer && "
            f"peer/bin/pip install {PEER}==0.2.7 transformers=={version('transformers')}`, and pass `peer/bin/python`."
        )
    peer, torch_version = done.stdout.split()
    return f"{peer} (torch {torch_version})"


def run_once(contender: Contender, case: Case, args: argparse.Namespace, folder: Path) -> dict:
    """One measurement in fresh processes: the worker's numbers, or `{"failed": why}`."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    reference = folder / f"{contender.kernel}-{case.heads}-{case.kv_heads}-{case.tokens}.pt"
    settings = {
        "contender": contender.name,
        "kernel": contender.kernel,
        "ranks": contender.ranks,
        "threads": contender.threads,
        "tokens": case.tokens,
        "device": args.device,
        "dtype": args.dtype,
        "checkpointing": args.checkpointing,
        "tiled_loss": args.tiled_loss,
        "utilization": in_one_process(args) and contender.ranks == 1,
        "profile": case.tokens == min(args.tokens),
        # Gradients of a large model at every length would take longer than the steps; norms are compared at all.
        "compare_gradients": case.tokens == CHECK_TOKENS or not in_one_process(args),
        "reference": str(reference),
        "result": str(result),
        "shape": {
            "vocab_size": args.vocab,
            "hidden_size": args.hidden,
            "intermediate_size": args.intermediate,
            "num_hidden_layers": args.layers,
            "num_attention_heads": case.heads,
            "num_key_value_heads": case.kv_heads,
            "head_dim": args.head_size,
        },
    }
    if in_one_process(args) and contender.ranks == 1:
        import ulysses_worker

        return measure_here(ulysses_worker.measure, settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(contender.ranks)]
    command = [contender.python, *(launcher if contender.ranks > 1 else []), str(WORKER), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(contender.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not result.exists():
        return {"failed": _reason(done.stderr)}
    return json.loads(result.read_text())


def _reason(stderr: str) -> str:
    """The first error a worker printed, in one line."""
    errors = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*Error: .*)$", stderr, re.MULTILINE)
    return errors[0] if errors else (stderr.strip().splitlines() or ["no output"])[-1]


def is_wrong(run: dict, dtype: str) -> bool:
    errors = [run.get(key, 0.0) for key in ("loss_error", "gradient_norm_error", "gradient_error")]
    return not all(error <= TOLERANCE[dtype] for error in errors)


def check_first(contenders: list[Contender], args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Compare every contender with the reference on short rows; a wrong `ulysses` ends the run.

    Returns:
        `dict`: why a contender cannot run a shape, by `"label, heads"`; those are not timed.
    """
    reasons = {}
    for heads, kv_heads in zip(args.heads, args.kv_heads):
        for contender in contenders:
            case = Case(heads, kv_heads, CHECK_TOKENS)
            run = run_once(contender, case, args, folder)
            name = f"{contender.label}, {heads}/{kv_heads} heads"
            if contender.name in OURS and "failed" not in run and is_wrong(run, args.dtype):
                run = {"failed": f"wrong, so its speed does not matter: {run}"}
            if "failed" in run and (contender.name == "ringmaster" or in_one_process(args)):
                reasons[name] = run["failed"]  # the others are measured all the same
                console.print(f"{name}: does not run: {run['failed']}", markup=False)
            elif "failed" in run:
                raise RuntimeError(f"{name} failed on {CHECK_TOKENS} tokens: {run['failed']}")
            elif "gradient_error" in run:
                console.print(f"{name}: loss off by {run['loss_error']:.1e}, gradients by {run['gradient_error']:.1e}")
    return reasons


def measure_all(contenders: list[Contender], args: argparse.Namespace, folder: Path) -> list[dict]:
    """`repeats` rounds of every contender on every case, interleaved; one row per case and contender."""
    cases = [Case(h, k, t) for h, k in zip(args.heads, args.kv_heads) for t in sorted(args.tokens)]
    deadline = time.monotonic() + 60 * args.minutes
    reasons = check_first(contenders, args, folder)
    rows = [
        {"case": case.label, **asdict(case), **asdict(c), "runs": [], "failed": reasons.get(name)}
        for case in cases
        for c in contenders
        for name in [f"{c.label}, {case.heads}/{case.kv_heads} heads"]
    ]
    for index in range(args.repeats):
        if index and time.monotonic() > deadline:
            break
        for row in rows:
            if row["failed"]:
                continue
            if in_one_process(args) and time.monotonic() > deadline:
                row["failed"] = None if row["runs"] else NO_TIME
                continue
            contender = next(c for c in contenders if c.label == row["label"])
            run = run_once(contender, Case(row["heads"], row["kv_heads"], row["tokens"]), args, folder)
            row["failed"] = run.get("failed")
            if not row["failed"]:
                row["runs"].append(run)
                if row["name"] in OURS and is_wrong(run, args.dtype):
                    wrong = f"{row['label']} is wrong at {row['case']}, so its speed does not matter: {run}"
                    if not in_one_process(args):
                        raise RuntimeError(wrong)
                    row["failed"] = wrong
                console.print(f"round {index + 1}: {row['case']}: {row['label']}: {run['seconds']:.2f} s")
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    peer = peer_version(args.peer_python)
    contenders = list_contenders(args)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(contenders, args, Path(folder))
    summarize(rows, os.cpu_count())
    rows = [{k: v for k, v in row.items() if k != "python"} for row in rows]
    result = describe_run("ulysses", arguments, args, ("hf-longctx", "torch", "transformers"), rows)
    if peer:
        result["versions"][PEER] = peer
        result["command"] = result["command"].replace(args.peer_python, "peer/bin/python")
    finish(page_of(result), result, args.output, console)
    if peer is None and args.ranks > 1:
        console.print(f"No row for {PEER}: pass `--peer_python`; `--help` says how to make its environment.")


if __name__ == "__main__":
    main()

"""Seconds and memory of LSH attention, by rounds and layout, against torch's scaled dot product attention.

What: forward and backward of attention alone on random queries, one row of one document, causal. LSH attention hashes,
sorts and attends; it has no keys besides its queries. Buckets are two for each chunk, as in the paper.

How: every measurement is a fresh process that warms up on a short row. Before it counts, output and gradients are
compared with float64 on the same buckets. *Peak* is the high-water mark of the step less what was held before it, in a
process of its own that gives freed memory back at once. Price: on one thread some 5 minutes and 1 GB.

    python recipes/bench/lsh_cpu.py --output docs/benchmarks/lsh_cpu.md
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from page import Page, add_medians, add_ratios, describe_run, device_of, fill, finish, quietness
from processes import add_one_process, in_one_process, measure_here, run_worker
from rich.console import Console
from ulysses_worker import Meter

from hf_longctx.attention.lsh_hashing import draw_rotations, hash_tokens
from hf_longctx.attention.lsh_rounds import Rounds, attend_rounds


FULL = "sdpa"
# Of the largest entry: sums over a few hundred numbers in float32, or products in half precision.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
CHECKED = 512
COLUMNS = {
    "tokens": "{tokens:,}",
    "attention": "{label}",
    "s": "{seconds:.3f}",
    "CPU s": "{cpu_seconds:.2f}",
    "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:,.0f}",
    "CPU time": lambda row: f"{row['cpu_seconds_ratio']:.2f}" if row.get("cpu_seconds_ratio") else "",
    "seconds": lambda row: f"{row['seconds_ratio']:.2f}" if row.get("seconds_ratio") else "",
    "peak": lambda row: f"{row['peak_bytes_ratio']:.2f}" if row.get("peak_bytes_ratio") else "",
    "error": "{error:.0e}",
    "others": "{other_load:.0%}",
}
READING = """\
- *CPU time*, *seconds*, *peak*: ratios to `sdpa` on the same row; below 1 is less.
- *error*: the worst of the output and both gradients against float64 on the same buckets, relative to the largest
  entry, on a row of {checked} tokens.
- LSH attention saves time, not memory: `sdpa` never holds its scores either. What it holds does not grow with the
  rounds, since the backward computes them again one at a time.
- When not to use it: rows that are shorter than a few thousand tokens, models that were not trained with it, and
  wherever full attention is wanted: it is another function.
"""
console = Console(width=max(Console().width, 130))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--full_up_to", type=int, default=2**30, help="longest row of full attention")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the table shows their median")
    add_one_process(parser)
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def draw(settings: dict, tokens: int, seed: int, dtype=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(1, settings["heads"], tokens, settings["head_size"], generator=generator)
    return drawn.to(settings["device"], dtype or getattr(torch, settings["dtype"]))


def attend(settings: dict, query, key, value, hashed=None):
    """The output `(1, T, heads, size)` of full attention, or of LSH attention, on these buckets or its own."""
    if settings["layout"] == FULL:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    size = settings["head_size"]
    if hashed is None:
        buckets = max(2, 2 * (query.shape[2] // settings["window"]))
        hashed = hash_tokens(query, draw_rotations(0, 0, 0, settings["heads"], size, settings["rounds"], buckets))
    return attend_rounds(query, value, hashed, Rounds(settings["layout"], settings["window"], True, size**-0.5))


def measure(settings: dict) -> dict:
    """One step of one attention in this process."""
    torch.set_num_threads(settings["cores"])
    error = _error(settings)
    names = ("query", "key", "value") if settings["layout"] == FULL else ("query", "value")

    def step(tokens: int, tensors: dict) -> None:
        output = attend(settings, tensors["query"], tensors.get("key"), tensors["value"])
        output.backward(draw(settings, tokens, 3).transpose(1, 2))

    def inputs(tokens: int) -> dict:
        return {name: draw(settings, tokens, seed).requires_grad_() for seed, name in enumerate(names)}

    step(min(CHECKED, settings["tokens"]), inputs(min(CHECKED, settings["tokens"])))
    tensors = inputs(settings["tokens"])
    meter = Meter(settings["device"])
    before = meter.memory()
    meter.reset_peak()
    meter.start()
    step(settings["tokens"], tensors)
    numbers, peak = meter.stop(), meter.peak()
    name = torch.cuda.get_device_name() if meter.cuda else "CPU"
    return {**numbers, "peak_bytes": peak - before, "error": error, "device_name": name}


def _error(settings: dict) -> float:
    """Against float64, on the buckets of the precision that is measured."""
    tokens = min(CHECKED, settings["tokens"])
    tensors = [draw(settings, tokens, seed) for seed in range(3)]
    upstream, results = draw(settings, tokens, 3).double().transpose(1, 2), []
    buckets = max(2, 2 * (tokens // settings["window"]))
    sizes = settings["heads"], settings["head_size"], max(settings["rounds"], 1), buckets
    hashed = hash_tokens(tensors[0], draw_rotations(0, 0, 0, *sizes))
    for dtype in (tensors[0].dtype, torch.float64):
        query, key, value = (x.to(dtype).requires_grad_() for x in tensors)
        output = attend(settings, query, key, value, hashed)
        gradients = torch.autograd.grad(output, (query, value), upstream.to(dtype))
        results.append([x.double() for x in (output, *gradients)])
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(*results))


def run_once(row: dict, args: argparse.Namespace) -> dict:
    names = ("window", "heads", "head_size", "dtype", "device", "cores")
    settings = {name: getattr(args, name) for name in names}
    settings |= {name: row[name] for name in ("tokens", "layout", "rounds")}
    if in_one_process(args):
        run = measure_here(measure, settings)
        if "failed" in run:
            raise RuntimeError(f"{row['label']} failed on {row['tokens']:,} tokens: {run['failed']}")
        return run
    run = run_worker(__file__, settings, args.cores, row["label"])
    again = run_worker(__file__, settings, args.cores, row["label"], gives_back=True)  # which takes time of its own
    return {**run, "peak_bytes": again["peak_bytes"]}


def rows_of(args: argparse.Namespace) -> list[dict]:
    """A row for each length, layout and number of rounds, full attention first."""
    contenders = [(FULL, FULL, 0)]
    for layout, name in (("causal", "causal LSH"), ("reformer", "LSH")):
        contenders += [(f"{name}, {n} round{'s' if n > 1 else ''}", layout, n) for n in args.rounds]
    return [
        {"tokens": tokens, "label": label, "layout": layout, "rounds": rounds, "runs": []}
        for tokens in args.tokens
        for label, layout, rounds in contenders
        if layout != FULL or tokens <= args.full_up_to
    ]


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    return Page(
        title=f"LSH attention on {device_of(result)}",
        intro=[
            f"Forward and backward of attention with {settings['heads']} heads of {settings['head_size']}, windows "
            f"and chunks of {settings['window']} tokens, {settings['cores']} thread(s), {settings['dtype']}."
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[quietness(result, "*s*")],
        reading=READING.format(checked=CHECKED),
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    rows = rows_of(args)
    for index in range(args.repeats):
        for row in rows:
            run = run_once(row, args)
            if not run["error"] <= TOLERANCES[args.dtype]:
                raise RuntimeError(f"{row['label']} is wrong, so its speed does not matter: {run['error']:.1e}")
            row["runs"].append(run)
            where = f"round {index + 1}: {row['tokens']:,} tokens, {row['label']}"
            console.print(f"{where}: {run['cpu_seconds']:.2f} CPU s", highlight=False)
    for row in rows:
        add_medians(row, row["runs"], os.cpu_count() or 1, ("peak_bytes",))
        row["error"] = max(run["error"] for run in row["runs"])
        full = next((r for r in rows if r["tokens"] == row["tokens"] and r["layout"] == FULL), None)
        if full is not None and full is not row:
            add_ratios(row, full, ("cpu_seconds", "seconds", "peak_bytes"))
    result = describe_run("lsh_cpu", arguments, args, ("hf-longctx", "torch"), rows)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

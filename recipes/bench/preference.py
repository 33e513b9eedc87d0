"""DPO on shared rows: its step against one process, the bytes of its gather, activations, and what flattening gains.

What: both forwards, the backward and the mean of gradients for one pair, at two ratios of lengths. The model has the
sizes of SmolLM2-135M and random weights.

How: one process with as many threads as there are ranks, against ranks of one thread each, in turn, so that other
programs disturb all ways alike. Losses and gradients are compared before anything is shown. On CUDA one process
compares padded with flattened rows. Price: on 2 quiet cores some minutes and 6 GB.

    python recipes/bench/preference.py --output docs/benchmarks/preference_cpu.md
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from page import Page, add_medians, add_ratios, describe_run, device_of, fill, finish, quietness
from preference_worker import ALONE, SHARED, SHARED_FLATTENED, measure
from processes import add_one_process, in_one_process
from rich.console import Console

from hf_longctx.proof.ranks import Ranks


PACKAGES = ("hf-longctx", "torch", "transformers", "trl")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of a loss and of the norm of its gradient
COLUMNS = {
    "lengths of a pair": "{lengths}",
    "way": "{label}",
    "real tokens": "{real_tokens:,} of {padded_tokens:,}",
    "s": "{seconds:.2f}",
    "CPU s": "{cpu_seconds:.2f}",
    "time": "{seconds_ratio:.2f}",
    "CPU time": "{cpu_seconds_ratio:.2f}",
    "activations": "{activation_bytes_ratio:.2f}",
    "gather / attention": lambda row: f"{row['gather_share']:.3%}" if row.get("gather_share") else "",
    "others": "{other_load:.0%}",
}
console = Console(width=max(Console().width, 130))

READING = """\
- **s**, **CPU s**: a step by the clock, and by the processors of all ranks that take part; medians.
- **time**, **CPU time**, **activations**: against one process on padded rows of the same lengths. Activations are the
  bytes that one rank keeps for its backward; weights of both models, gradients and states of the optimizer are
  replicated under DDP, and not in it. Two ranks that lose nothing have a *CPU time* of 1.00, on half the clock of one
  thread, and on that of one process of two threads.
- **gather / attention**: bytes that leave a rank for the numbers of whole rows, over those of its all-to-alls.
- **others**: the share of the cores that other programs used meanwhile. With more than 5 % the clock says little.
"""

WHEN_NOT = """\
- Where a row fits one process, data-parallel groups need no exchange in a layer.
- Where the rows of a batch are about as long, flattening gains nothing.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the longer row")
    parser.add_argument("--shorter", type=int, nargs="+", default=[1, 4], help="how much shorter the other row is")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv_heads", type=int, default=3)
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of one process; as many as there are ranks unless given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written next to it")
    add_one_process(parser)
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> dict:
    config = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "tie_word_embeddings": True,
        "max_position_embeddings": max(8192, 2 * args.tokens),
    }
    names = ("tokens", "shorter", "repeats", "device", "dtype", "threads")
    return {"config": config, **{name: getattr(args, name) for name in names}}


def attention_bytes(args: argparse.Namespace, row: dict) -> int:
    """What a rank sends in the all-to-alls of a policy's forward and backward and of a reference's forward."""
    size, width = args.hidden // args.heads, 2 * args.heads + 2 * args.kv_heads
    tokens = row["real_tokens"] if row["label"] == SHARED_FLATTENED else row["padded_tokens"]
    share = tokens // args.ranks * (args.ranks - 1) // args.ranks
    return 3 * 4 * args.layers * width * size * share


def check(rows: list[dict], args: argparse.Namespace) -> None:
    """What is compared, and the bytes of attention; different losses end the run."""
    alone = {row["lengths"]: row for row in rows if row["label"] == ALONE}
    for row in rows:
        reference = alone[row["lengths"]]
        for name in ("loss", "norm"):
            row[f"{name}_error"] = abs(row[name] - reference[name]) / max(abs(reference[name]), 1.0)
            if not row[f"{name}_error"] <= TOLERANCE[args.dtype]:
                raise SystemExit(f"`{row['label']}` has another {name}: {row[name]} is not {reference[name]}")
        if row["label"] in (SHARED, SHARED_FLATTENED):
            row["attention_bytes"] = attention_bytes(args, row)


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians, and ratios to one process on padded rows of the same lengths."""
    alone = {row["lengths"]: row for row in rows if row["label"] == ALONE}
    for row in rows:
        add_medians(row, row["runs"], cores)
        add_ratios(row, alone[row["lengths"]], ("seconds", "cpu_seconds", "activation_bytes"))
        if "attention_bytes" in row:
            row["gather_share"] = row["gather_bytes"] / row["attention_bytes"]


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings, rows = result["settings"], result["rows"]
    worst = max(max(row["loss_error"], row["norm_error"]) for row in rows)
    ranks = ""
    if settings["device"] == "cpu":
        threads = settings["threads"] or settings["ranks"]
        ranks = f"; {settings['ranks']} ranks of one thread, one process of {threads}"
    return Page(
        title=f"DPO on shared and flattened rows, on {device_of(result)}",
        intro=[
            f"One pair of rows, the longer of {settings['tokens']:,} tokens, {settings['layers']} layers of width "
            f"{settings['hidden']} and {settings['vocab']:,} words, {settings['dtype']}, policy and reference, no "
            f"checkpointing{ranks}."
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in rows],
        notes=[
            quietness(result, "*s* and *time*", rest="Bytes are, and *CPU time* roughly."),
            f"Losses and norms of the gradient differ by at most {worst:.0e}.",
        ],
        reading=READING,
        sections={"When not to use it": WHEN_NOT},
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    settings = settings_of(args)
    if in_one_process(args):
        rows = measure(settings)
    else:
        with Ranks(args.ranks) as ranks:
            rows = ranks.run(measure, settings, seconds=3600)[0]
    check(rows, args)
    summarize(rows, os.cpu_count() or 1)
    result = describe_run("preference", arguments, args, PACKAGES, rows)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

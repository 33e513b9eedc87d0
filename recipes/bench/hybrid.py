"""Time and traffic of one gated delta rule layer on rows that ranks share: by heads, by states, and on one process.

What: forward and backward of one `Qwen3NextGatedDeltaNet` with random weights, on float32 rows of several lengths.
*Heads* trades tokens for heads, as attention does; *states* hands the state on from rank to rank. The layer chooses
what sends less.

How: ranks have one thread each and take the variants in turn. The first rank runs the whole row by itself while the
others wait, then all run their shares; gradients of both must be equal. Bytes are counted at the collectives, and must
be those of the formula. Price: on 2 cores, some 2 minutes at the defaults.

    python recipes/bench/hybrid.py --output docs/benchmarks/hybrid_cpu.md
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hybrid_worker import formula, measure
from page import Page, add_medians, describe_run, fill, finish, quietness
from rich.console import Console

from hf_longctx.proof.ranks import Ranks


EXCHANGES = ("heads", "states")
TOLERANCE = 1e-4  # float32: the gradient of `A_log` is a sum that cancels
COLUMNS = {
    "tokens": "{tokens:,}",
    "exchange": "{exchange}",
    "chosen": "{chosen}",
    "s": "{seconds:.2f}",
    "CPU s, all ranks": "{cpu_seconds:.2f}",
    "CPU s, one process": "{alone:.2f}",
    "CPU time": "{cpu_ratio:.2f}",
    "MB a rank": lambda row: f"{row['bytes'] / 1e6:.2f}",
    "formula MB": lambda row: f"{row['formula'] / 1e6:.2f}",
    "gradient error": "{error:.0e}",
    "others": "{other_load:.0%}",
}
READING = """\
- *CPU time*: seconds of the processor of all ranks over those of one process on the whole row; 1 is no extra work.
- *MB a rank*: what left a rank in one forward and backward, the tails of the convolution included, counted at the
  collectives; *formula*: what `explain_attention` says of the rule, and the tails.
- By heads traffic grows with the row; by states it does not, but ranks after the first read the incoming state, with
  values that are wider by a key.
- *gradient error*: the worst of the inputs and weights against one process, relative to its norm.
"""
console = Console(width=max(Console().width, 130))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8, help="of values")
    parser.add_argument("--key_heads", type=int, default=4)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the table shows their median")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace, tokens: int) -> dict:
    return {
        **{name: getattr(args, name) for name in ("ranks", "hidden", "heads", "key_heads", "head_size")},
        "tokens": tokens,
    }


def run_once(settings: dict, ranks: Ranks) -> dict:
    """One measurement: the sums and the worst of all ranks."""
    answers = ranks.run(measure, settings)
    together = [answer["together"] for answer in answers]
    return {
        "seconds": max(times["seconds"] for times in together),
        "cpu_seconds": sum(times["cpu_seconds"] for times in together),
        "machine_cpu_seconds": max(times["machine_cpu_seconds"] for times in together),
        "alone": answers[0]["alone"]["cpu_seconds"],
        "bytes": max(answer["bytes"] for answer in answers),
        "error": answers[0]["error"],
        "device_name": "CPU",
    }


def validate(row: dict, run: dict) -> None:
    """A variant that is wrong, or sends other bytes than the formula says, is not timed."""
    if not run["error"] <= TOLERANCE or run["bytes"] != row["formula"]:
        raise RuntimeError(
            f"{row['exchange']} at {row['tokens']:,} tokens: error {run['error']:.1e}, {run['bytes']:,} bytes sent, "
            f"{row['formula']:,} by the formula, so its speed does not matter"
        )


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians and the ratio to one process; each round has its own."""
    for row in rows:
        for run in row["runs"]:
            run["cpu_ratio"] = run["cpu_seconds"] / run["alone"]
        add_medians(row, row["runs"], cores, ("alone", "cpu_ratio"))
        row["bytes"] = max(run["bytes"] for run in row["runs"])
        row["error"] = max(run["error"] for run in row["runs"])


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    return Page(
        title="A gated delta rule layer on shared rows",
        intro=[
            f"Forward and backward of one `Qwen3NextGatedDeltaNet` of width {settings['hidden']}, {settings['heads']} "
            f"heads of {settings['head_size']} over {settings['key_heads']} key heads, float32, on "
            f"{settings['ranks']} processes with one thread each, joined by gloo, against one process with one thread."
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[quietness(result, "*s*", rest="*CPU time* is, roughly: both sides were measured one after the other.")],
        reading=READING,
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    rows = [{"tokens": tokens, "exchange": way, "runs": []} for tokens in args.tokens for way in EXCHANGES]
    for row in rows:
        settings = settings_of(args, row["tokens"])
        row["formula"] = formula(settings, row["exchange"])
        row["chosen"] = "yes" if row["formula"] == min(formula(settings, way) for way in EXCHANGES) else ""
    with Ranks(args.ranks) as ranks:
        for index in range(args.repeats):
            for row in rows:
                run = run_once({**settings_of(args, row["tokens"]), "exchange": row["exchange"]}, ranks)
                validate(row, run)
                row["runs"].append(run)
                shown = f"{row['exchange']} at {row['tokens']:,}: {run['cpu_seconds'] / run['alone']:.2f}"
                console.print(f"round {index + 1}: {shown}", highlight=False)
    summarize(rows, args.cores)
    result = describe_run("hybrid", arguments, args, ("hf-longctx", "torch", "transformers"), rows)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

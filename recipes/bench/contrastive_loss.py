"""Seconds and peak memory of in-batch negatives from embeddings: ours in tiles, and sentence-transformers' two losses.

What: from embeddings of `N` queries and `N` positives, `(N, D)` each in float32, to the loss and both gradients; no
model. The cached loss of sentence-transformers cuts this stage into pieces of its `mini_batch_size`.

How: every measurement is a fresh process that warms up on 512 pairs, and repeats short ones. Correctness comes first:
loss and gradients of all must equal those of the whole matrix. Price: on 2 cores, some 5 minutes and 5 GB.

    python recipes/bench/contrastive_loss.py --output docs/benchmarks/contrastive_loss_cpu.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from page import QUIET, describe_machine, device_of, markdown_table, print_table, run_worker, write_page
from rich.console import Console
from ulysses_worker import Meter


# (label, who, rows of a piece)
CONTENDERS = (
    ("whole matrix (`MultipleNegativesRankingLoss`)", "whole", None),
    ("cached, `mini_batch_size=32` (default)", "cached", 32),
    ("cached, `mini_batch_size=512`", "cached", 512),
    ("ours", "ours", 1024),
)
CHECK_PAIRS = 1500  # more than a tile, and no multiple of one
TOLERANCE = 1e-5  # float32: sums over 1,500 candidates in another order, of gradients that nearly cancel
WARM_UP_PAIRS = 512
REPEATED_SECONDS = 5  # what takes less is measured three times
HEADERS = ("pairs", "loss", "s", "CPU s", "time", "CPU time", "peak MB", "others")
console = Console(width=max(Console().width, 130))

READING = """\
- **s**, **CPU s**: forward and backward by the clock, and by the processor over all threads; median of up to three.
- **time**, **CPU time**: against the whole matrix of as many pairs.
- **peak MB**: the high-water mark of the process less what it held before the step; both gradients are in it.
- **others**: the share of the cores that other programs used meanwhile. With more than 5 % the clock says little.
- Peers are not measured beyond {longest:,} pairs: at {largest:,} the whole matrix would need {whole:.0f} GB, and the
  time of the cached loss grows with the square of the pairs.
"""

WHEN_NOT = """\
- **Small batches.** Up to a few thousand pairs the matrix is small beside the model's activations; take what you have.
- **Another similarity** than cosine or dot product: the tiles know the gradient of these two only.
- **Two backwards through one loss.** The gradient is made once, in the forward.
- **Because larger batches must be better.** They are up to a size that depends on the data, and not beyond.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 8192, 16384, 65536])
    parser.add_argument("--peers_up_to", type=int, default=16384, help="more pairs are measured for ours only")
    parser.add_argument("--width", type=int, default=384, help="size of an embedding, D")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written next to it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_step(who: str, piece: int | None):
    """From two columns of embeddings to the loss, with gradients in them."""
    if who == "ours":
        from hf_longctx.losses.contrastive import contrastive_loss

        def ours(columns):
            loss = contrastive_loss(columns, tile_size=piece)
            loss.backward()
            return loss.detach()

        return ours
    from sentence_transformers.sentence_transformer import losses

    if who == "whole":
        whole = losses.MultipleNegativesRankingLoss(torch.nn.Identity())

        def matrix(columns):
            loss = whole.compute_loss_from_embeddings(columns, None)
            loss.backward()
            return loss.detach()

        return matrix
    # It looks into the first module of a model; here there is none to look into.
    model = torch.nn.Sequential(torch.nn.Identity())
    cached = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=piece)
    return lambda columns: cached.calculate_loss([[column] for column in columns], with_backward=True)


def draw(pairs: int, settings: dict) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(pairs, settings["width"], generator=generator)
    positive = query + 2 * torch.randn(pairs, settings["width"], generator=generator)
    return [x.to(settings["device"]).requires_grad_() for x in (query, positive)]


def measure(settings: dict) -> dict:
    """The steps of one contender in this process; the peak is that of the first."""
    torch.set_num_threads(settings["cores"])
    step, meter = make_step(settings["who"], settings["piece"]), Meter(settings["device"])
    step(draw(WARM_UP_PAIRS, settings))
    columns, runs = draw(settings["pairs"], settings), []
    before = meter.memory()
    meter.reset_peak()
    while not runs or (len(runs) < 3 and runs[0]["seconds"] < REPEATED_SECONDS):
        for column in columns:
            column.grad = None
        meter.start()
        loss = step(columns)
        runs.append(meter.stop())
        if len(runs) == 1:
            peak_bytes = meter.peak() - before
    name = torch.cuda.get_device_name() if meter.cuda else "CPU"
    result = {"runs": [{**run, "device_name": name} for run in runs], "peak_bytes": peak_bytes, "loss": loss.item()}
    if settings["reference"]:
        gradients = [column.grad for column in columns]
        if os.path.exists(settings["reference"]):
            expected = torch.load(settings["reference"], weights_only=True)
            pairs = zip([loss, *gradients], expected)
            result["error"] = max(((x.cpu() - y).norm() / y.norm()).item() for x, y in pairs)
        else:
            torch.save([loss.cpu(), *(gradient.cpu() for gradient in gradients)], settings["reference"])
    return result


def run_once(contender: tuple, pairs: int, args: argparse.Namespace, reference: Path | None = None) -> dict:
    settings = {name: getattr(args, name) for name in ("width", "device", "cores")}
    settings |= {"who": contender[1], "piece": contender[2], "pairs": pairs}
    settings["reference"] = reference and str(reference)
    return run_worker(__file__, settings, args.cores, contender[0])


def check_first(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Every contender against the whole matrix; one that is wrong ends the run."""
    errors = {}
    for contender in CONTENDERS:
        result = run_once(contender, CHECK_PAIRS, args, folder / "gradients.pt")
        if "error" in result:
            errors[contender[0]] = result["error"]
            if not result["error"] <= TOLERANCE:
                raise RuntimeError(f"{contender[0]} is wrong, so its speed does not matter: {result['error']}")
    return errors


def measure_all(args: argparse.Namespace) -> list[dict]:
    rows = []
    for pairs in sorted(args.pairs):
        for contender in CONTENDERS:
            if pairs > args.peers_up_to and contender[1] != "ours":
                continue
            rows.append({"pairs": pairs, "label": contender[0], **run_once(contender, pairs, args)})
            console.print(f"{pairs:,} pairs: {contender[0]}: {rows[-1]['runs'][0]['seconds']:.2f} s", highlight=False)
    return rows


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians, and ratios to the whole matrix of as many pairs."""
    for row in rows:
        for key in ("seconds", "cpu_seconds"):
            row[key] = median(run[key] for run in row["runs"])
        others = [(r["machine_cpu_seconds"] - r["cpu_seconds"]) / (r["seconds"] * cores) for r in row["runs"]]
        row["other_load"] = max(0.0, median(others))
        whole = next((other for other in rows if other["pairs"] == row["pairs"]), row)
        for key in ("seconds", "cpu_seconds"):
            row[f"{key}_ratio"] = None if whole["label"] != CONTENDERS[0][0] else row[key] / whole[key]


def cells(row: dict) -> list[str]:
    ratios = [row["seconds_ratio"], row["cpu_seconds_ratio"]]
    return [
        f"{row['pairs']:,}",
        row["label"],
        f"{row['seconds']:.2f}",
        f"{row['cpu_seconds']:.2f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{row['peak_bytes'] / 1e6:,.0f}",
        f"{row['other_load']:.0%}",
    ]


def quietness(rows: list[dict]) -> str:
    """Whether the clock of this run can be believed."""
    loads = [row["other_load"] for row in rows]
    used = f"other programs used {min(loads):.0%} to {max(loads):.0%} of the cores"
    if max(loads) <= QUIET:
        return f"The machine was quiet: {used}."
    return f"**The machine was busy**: {used}. Memory can be read as it is, *CPU s* roughly, *s* and *time* cannot."


def write_report(result: dict, path: Path) -> None:
    settings, largest = result["settings"], max(row["pairs"] for row in result["rows"])
    lines = [
        f"# The contrastive loss on {device_of(result)}: time and memory",
        "",
        f"`N` random queries and positives of size {settings['width']} in float32, cosine, scale 20.",
        "",
        markdown_table(HEADERS, map(cells, result["rows"])),
        "",
        quietness(result["rows"]),
        "",
        *(
            f"- {label}: on {CHECK_PAIRS:,} pairs loss and gradients are off by {error:.1e} from the whole matrix."
            for label, error in result["errors"].items()
        ),
        "",
        "## How to read it",
        "",
        READING.format(longest=settings["peers_up_to"], largest=largest, whole=4 * 4 * largest**2 / 1e9),
        "## When not to use it",
        "",
        WHEN_NOT,
    ]
    write_page(path, result, lines)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.worker:
        sys.stdout.write(json.dumps(measure(json.loads(args.worker))) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        errors = check_first(args, Path(folder))
    rows = measure_all(args)
    summarize(rows, os.cpu_count())
    result = {
        "command": f"python recipes/bench/contrastive_loss.py {' '.join(arguments or sys.argv[1:])}".strip(),
        "versions": {name: version(name) for name in ("hf-longctx", "torch", "sentence-transformers")},
        "machine": describe_machine(rows),
        "settings": {key: value for key, value in vars(args).items() if key not in ("output", "worker")},
        "errors": errors,
        "rows": rows,
    }
    print_table(result, HEADERS, map(cells, rows), console, [quietness(rows)])
    if args.output:
        write_report(result, args.output)


if __name__ == "__main__":
    main()

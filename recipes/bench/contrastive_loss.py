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
from pathlib import Path

import torch
import torch.nn.functional as F
from page import Page, add_medians, add_ratios, bullets, describe_run, device_of, fail, fill, finish, quietness
from processes import add_one_process, in_one_process, measure_here, run_worker
from rich.console import Console
from ulysses_worker import Meter
from versions import what_is_missing


# (label, who, rows of a piece)
CONTENDERS = (
    ("whole matrix (`MultipleNegativesRankingLoss`)", "whole", None),
    ("cached, `mini_batch_size=32` (default)", "cached", 32),
    ("cached, `mini_batch_size=512`", "cached", 512),
    ("ours", "ours", 1024),
)
SENTENCE_TRANSFORMERS = {"sentence-transformers": "6.2"}
CHECK_PAIRS = 1500  # more than a tile, and no multiple of one
TOLERANCE = 1e-5  # float32: sums over 1,500 candidates in another order, of gradients that nearly cancel
WARM_UP_PAIRS = 512
REPEATED_SECONDS = 5  # what takes less is measured three times
COLUMNS = {
    "pairs": "{pairs:,}",
    "loss": "{label}",
    "s": "{seconds:.2f}",
    "CPU s": "{cpu_seconds:.2f}",
    "time": "{seconds_ratio:.2f}",
    "CPU time": "{cpu_seconds_ratio:.2f}",
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
    "others": "{other_load:.0%}",
}
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
    add_one_process(parser)
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
    if who == "plain":
        return plain_step
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


def plain_step(columns: list[torch.Tensor]) -> torch.Tensor:
    """The whole matrix as sentence-transformers computes it, for machines that have none or an older one."""
    query, positive = (F.normalize(column, dim=-1) for column in columns)
    loss = F.cross_entropy(20 * query @ positive.T, torch.arange(len(query), device=query.device))
    loss.backward()
    return loss.detach()


def list_contenders() -> list[tuple[str, str, int | None]]:
    """Who runs, the reference first; sentence-transformers' losses only of a version that this project supports."""
    if what_is_missing(SENTENCE_TRANSFORMERS) is None:
        return list(CONTENDERS)
    return [("whole matrix, in torch", "plain", None), CONTENDERS[-1]]


def draw(pairs: int, settings: dict) -> list[torch.Tensor]:
    options = {"device": settings["device"], "generator": torch.Generator(settings["device"]).manual_seed(0)}
    query = torch.randn(pairs, settings["width"], **options)
    positive = query + 2 * torch.randn(pairs, settings["width"], **options)
    return [x.requires_grad_() for x in (query, positive)]


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
    if in_one_process(args):
        return measure_here(measure, settings)
    return run_worker(__file__, settings, args.cores, contender[0])


def check_first(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Every contender against the whole matrix; one that is wrong ends the run."""
    errors = {}
    for contender in list_contenders():
        result = run_once(contender, CHECK_PAIRS, args, folder / "gradients.pt")
        if "failed" in result:
            raise RuntimeError(f"{contender[0]} failed on {CHECK_PAIRS:,} pairs: {result['failed']}")
        if "error" in result:
            errors[contender[0]] = result["error"]
            if not result["error"] <= TOLERANCE:
                raise RuntimeError(f"{contender[0]} is wrong, so its speed does not matter: {result['error']}")
    return errors


def measure_all(args: argparse.Namespace) -> list[dict]:
    rows = []
    for pairs in sorted(args.pairs):
        for contender in list_contenders():
            if pairs > args.peers_up_to and contender[1] != "ours":
                continue
            row = {"pairs": pairs, "label": contender[0], "runs": [], **run_once(contender, pairs, args)}
            rows.append(row)
            shown = row.get("failed") or f"{row['runs'][0]['seconds']:.2f} s, {row['peak_bytes'] / 1e6:,.0f} MB"
            console.print(f"{pairs:,} pairs: {contender[0]}: {shown}", highlight=False)
    return rows


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians, and ratios to the whole matrix of as many pairs."""
    wholes = {}
    for row in rows:
        if not row["runs"]:
            continue
        add_medians(row, row["runs"], cores)
        if row["label"].startswith("whole"):
            wholes[row["pairs"]] = row
        if row["pairs"] in wholes:
            add_ratios(row, wholes[row["pairs"]])


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings, rows = result["settings"], result["rows"]
    largest = max(row["pairs"] for row in rows)
    return Page(
        title=f"The contrastive loss on {device_of(result)}: time and memory",
        intro=[f"`N` random queries and positives of size {settings['width']} in float32, cosine, scale 20."],
        headers=list(COLUMNS),
        cells=[
            fail(COLUMNS, f"{row['pairs']:,}", row["label"], row["failed"])
            if row.get("failed")
            else fill(COLUMNS, row)
            for row in rows
        ],
        notes=[
            quietness(result, "*s* and *time*"),
            result.get("missing", ""),
            bullets(
                f"{label}: on {CHECK_PAIRS:,} pairs loss and gradients are off by {error:.1e} from the whole matrix."
                for label, error in result["errors"].items()
            ),
        ],
        reading=READING.format(longest=settings["peers_up_to"], largest=largest, whole=4 * 4 * largest**2 / 1e9),
        sections={"When not to use it": WHEN_NOT},
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.worker:
        sys.stdout.write(json.dumps(measure(json.loads(args.worker))) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        errors = check_first(args, Path(folder))
    rows = measure_all(args)
    summarize(rows, os.cpu_count())
    packages = ("hf-longctx", "torch", "sentence-transformers")
    result = describe_run("contrastive_loss", arguments, args, packages, rows) | {"errors": errors}
    missing = what_is_missing(SENTENCE_TRANSFORMERS)
    if missing:
        result["missing"] = f"Without sentence-transformers' losses: {missing}."
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

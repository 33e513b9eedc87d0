"""Real tokens per second of training on ragged documents: padded, packed by TRL, and packed by us, side by side.

What: forward with the causal loss and backward of a Llama with random weights on the same documents, (a) in padded
random batches with the stock `sdpa`, (b) in rows of TRL's best-fit packing with the stock `sdpa`, which masks a row
with `T x T` entries, (c) in rows of `PackedDataset` with `attn_implementation="packed"`. Lengths are spread like those
of FLAN (very ragged) and OrcaMath (less so); one more case is a row of 16 equal documents, where (b) and (c) differ in
the mask only. On CUDA everything is bfloat16, and (b) runs `flash_attention_2` too where it is installed; no one has
measured that mode yet.

How: every variant of a case is a process of its own (`packing_worker.py`), so its peak memory is its own; they take
turns within each round, so a slow minute of the machine hits all of them. Correctness comes first: on a small batch,
losses and all gradients must equal those of the first variant before anything is timed, and in every round the mean
loss of all documents. A variant that is wrong is reported as wrong and not timed. Price: on 2 quiet cores, some 14
minutes and 19 GB at the defaults, 6 minutes and 9 GB with `--layers 2`.

    python recipes/bench/packing.py --output docs/benchmarks/packing_cpu.md
    python recipes/bench/packing.py --cases flan-30m mask --repeats 1
    python recipes/bench/packing.py --device cuda --output docs/benchmarks/packing_cuda.md
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from packing_batches import CHECKED_LENGTHS, COLLATORS, MIXES, count_tokens, draw_lengths, make_documents
from packing_processes import start_workers
from packing_report import page_of, summarize
from page import describe_run, finish
from processes import add_one_process
from rich.console import Console


# Relative to the largest entry. float32: the project's own promise; its 24 bits lose a few when some thousand terms
# are summed in another order. bfloat16: a step of 2**-8, taken at some 64 roundings down the layers, adds up to 8.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-5}
DOCUMENTS_OF_MASK_CASE = 16
console = Console(width=max(Console().width, 170))


@dataclass(frozen=True)
class Variant:
    """One row of the table: how documents are collated, and which attention the model runs."""

    label: str
    collation: str
    attention: str


@dataclass(frozen=True)
class Case:
    """One mix of lengths on one model; `mix` is a key of `MIXES`, or `None` for documents of equal length."""

    name: str
    mix: str | None
    model: str

    @property
    def label(self) -> str:
        lengths = MIXES[self.mix].label if self.mix else f"{DOCUMENTS_OF_MASK_CASE} equal documents"
        return f"{lengths}, {MODEL_LABELS[self.model]}"


# SmolLM2-135M's shape, and a model of 30 million parameters whose small vocabulary leaves the work to the layers.
SHAPES = {
    "30m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
}
SHAPES["1b"] = {  # of Llama 3.2, whose 16 layers and 128,256 words `--layers` and fewer words cut down
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
SHAPES["tiny"] = {  # for trying the code
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
MODEL_LABELS = {"30m": "30M", "smollm2": "SmolLM2 shape", "1b": "1B shape", "tiny": "tiny"}
CASES = (
    Case("flan-30m", "flan", "30m"),
    Case("orcamath-30m", "orcamath", "30m"),
    Case("flan-smollm2", "flan", "smollm2"),
    Case("orcamath-smollm2", "orcamath", "smollm2"),
    Case("mask", None, "30m"),
    Case("flan-1b", "flan", "1b"),
    Case("orcamath-1b", "orcamath", "1b"),
    Case("flan-tiny", "flan", "tiny"),
)
BY_DEFAULT = [case.name for case in CASES if case.model in ("30m", "smollm2")]
CUT_SHAPES = ("smollm2", "1b")  # whose layers `--layers` sets


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--row_tokens", type=int, help="budget of a packed row (CPU: 2048; CUDA: 16384)")
    parser.add_argument("--mask_row_tokens", type=int, default=8192, help="tokens of the row of the case `mask`")
    parser.add_argument("--rows", type=int, help="packed rows of one measurement (CPU: 1; CUDA: 8)")
    parser.add_argument(
        "--layers", type=int, default=SHAPES["smollm2"]["num_hidden_layers"], help="layers of the larger shapes"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the table shows their median")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_one_process(parser)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each process, one at work at a time"
    )
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json and a .png are written next to it")
    args = parser.parse_args(arguments)
    on_cpu = args.device == "cpu"
    args.cases = args.cases or BY_DEFAULT
    args.row_tokens = args.row_tokens or (2048 if on_cpu else 16384)
    args.rows = args.rows or (1 if on_cpu else 8)
    args.dtype = "float32" if on_cpu else "bfloat16"
    validate_arguments(args)
    return args


def validate_arguments(args: argparse.Namespace) -> None:
    """Raise before the first process starts what would fail in all of them."""
    for name in ("row_tokens", "mask_row_tokens", "rows", "layers", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` ({getattr(args, name)}) must be at least 1.")
    for name in ("row_tokens", "mask_row_tokens"):
        if getattr(args, name) < sum(CHECKED_LENGTHS):
            raise ValueError(
                f"`{name}` ({getattr(args, name)}) must be at least {sum(CHECKED_LENGTHS)}, so that the checked "
                "documents fit in a row: use longer rows."
            )
    if args.mask_row_tokens % DOCUMENTS_OF_MASK_CASE:
        raise ValueError(
            f"`mask_row_tokens` ({args.mask_row_tokens}) must be a multiple of {DOCUMENTS_OF_MASK_CASE}, for as many "
            "equal documents: round it."
        )


def list_variants(case: Case, device: str) -> list[Variant]:
    """Who runs, in this order in every round; the first is the reference of the check."""
    padded = [Variant("padded, sdpa", "padded", "sdpa")] if case.mix else []  # equal documents need no padding
    # TRL's own code where it is installed, else batches of the same form.
    trl = "packed by TRL" if importlib.util.find_spec("trl") is not None else "packed as by TRL"
    by_trl = [Variant(f"{trl}, sdpa", "trl", "sdpa")]
    if device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        by_trl.append(Variant(f"{trl}, flash_attention_2", "trl", "flash_attention_2"))
    return [*padded, *by_trl, Variant('ours, "packed"', "ours", "packed")]


def make_batches(case: Case, variants: list[Variant], shape: dict, args: argparse.Namespace, folder: Path) -> dict:
    """Write each collation's batches to `folder/COLLATION.pt`, and say what is in them."""
    if case.mix:
        lengths, batch_size, usual_padding = draw_lengths(MIXES[case.mix], args.row_tokens, args.rows)
        row_tokens = args.row_tokens
    else:
        row_tokens, usual_padding = args.mask_row_tokens, 0.0
        lengths, batch_size = [row_tokens // DOCUMENTS_OF_MASK_CASE] * DOCUMENTS_OF_MASK_CASE, DOCUMENTS_OF_MASK_CASE
    measured = make_documents(lengths, shape["vocab_size"])
    checked = make_documents(CHECKED_LENGTHS, shape["vocab_size"])
    facts = {"lengths": [int(length) for length in lengths], "usual_padding": usual_padding, "batches": {}}
    for collation in dict.fromkeys(variant.collation for variant in variants):
        collate = COLLATORS[collation]
        batches = {
            "check": collate(checked, len(checked), row_tokens),
            "measure": collate(measured, batch_size, row_tokens),
        }
        torch.save(batches, folder / f"{collation}.pt")
        sizes = [tuple(batch["input_ids"].shape) for batch in batches["measure"]]
        real = sum(count_tokens(batch) for batch in batches["measure"])
        assert real == sum(facts["lengths"]), f"{collation} lost documents"
        computed = sum(rows * tokens for rows, tokens in sizes)
        facts["batches"][collation] = {"sizes": sizes, "real_tokens": real, "padding": 1 - real / computed}
    return facts


def measure_case(case: Case, args: argparse.Namespace, folder: Path) -> tuple[dict, list[dict]]:
    """Check every variant of a case, then `repeats` rounds of those that are right, taking turns.

    Returns:
        tuple of the facts of the case, and one row a variant; a row that `failed` says why.
    """
    shape = dict(SHAPES[case.model])
    if case.model in CUT_SHAPES:
        shape["num_hidden_layers"] = min(args.layers, shape["num_hidden_layers"])
    variants = list_variants(case, args.device)
    facts = make_batches(case, variants, shape, args, folder)
    rows = [
        {"case": case.label, **asdict(variant), **facts["batches"][variant.collation], "runs": []}
        for variant in variants
    ]
    limits = {"max_position_embeddings": max(args.row_tokens, args.mask_row_tokens)}
    with start_workers(variants, {**shape, **limits}, args, folder) as workers:
        for row, worker in zip(rows, workers):
            row["check"] = worker.ask("check")
            row["failed"] = row["check"].get("failed") or wrong(row["check"], args.dtype)
            console.print(f"{case.label}: {row['label']}: {row['failed'] or _describe_check(row['check'])}")
        for index in range(args.repeats):
            for row, worker in zip(rows, workers):
                if not row["failed"]:
                    run = worker.ask("measure")
                    _add_run(row, run, rows[0]["runs"], args.dtype)
                    result = row["failed"] or f"{row['real_tokens'] / run['seconds']:,.0f} real tokens/s"
                    console.print(f"round {index + 1}: {case.label}: {row['label']}: {result}")
    parameters = next((row["check"]["parameters"] for row in rows if "parameters" in row["check"]), None)
    facts |= {"case": case.label, "model": MODEL_LABELS[case.model], "shape": shape, "parameters": parameters}
    return {**facts, "full_layers": SHAPES[case.model]["num_hidden_layers"]}, rows


def _describe_check(check: dict) -> str:
    if "gradient_error" not in check:
        return "the reference"
    return f"loss off by {check['loss_error']:.1e}, gradients by {check['gradient_error']:.1e}"


def _add_run(row: dict, run: dict, reference_runs: list[dict], dtype: str) -> None:
    """Keep a measurement if its mean loss is that of the case's first variant."""
    if "failed" not in run and reference_runs:
        run["loss_error"] = abs(run["loss"] / reference_runs[0]["loss"] - 1)
    row["failed"] = run.get("failed") or wrong(run, dtype)
    if not row["failed"]:
        row["runs"].append(run)


def wrong(run: dict, dtype: str) -> str | None:
    """Why the numbers of a variant do not count, if they do not."""
    errors = {key: run[key] for key in ("loss_error", "gradient_error") if key in run}
    if all(error <= TOLERANCE[dtype] for error in errors.values()):
        return None
    found = ", ".join(f"{key.replace('_', ' ')} {error:.1e}" for key, error in errors.items())
    return f"wrong, so not timed: {found}, allowed {TOLERANCE[dtype]:.0e}"


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    cases, rows = [], []
    for case in CASES:
        if case.name in args.cases:
            with tempfile.TemporaryDirectory() as folder:
                facts, measured = measure_case(case, args, Path(folder))
            cases.append(facts)
            rows += measured
    summarize(rows, os.cpu_count())
    result = describe_run("packing", arguments, args, ("hf-longctx", "torch", "transformers", "trl"), rows)
    result |= {"checked": len(CHECKED_LENGTHS), "cases": cases}
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

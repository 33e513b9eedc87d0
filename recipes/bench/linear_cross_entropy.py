"""Torch's own chunked loss, `torch.nn.functional.linear_cross_entropy`, next to `tiled_cross_entropy` in one run.

What: the error of the loss and of the worst gradient in every precision, against whole logits in float64; what either
does with label smoothing, ignored labels and autocast; then seconds and peak memory of one row, forward and backward.
Torch's is measured with the chunks that it chooses and with chunks of our tile size.

How: errors and behaviour in this process; every timed measurement is a fresh process (`tiled_loss_worker.py`), and the
contenders take turns within each round. Price: on one free core some 6 minutes at the defaults. Needs torch 2.13.

    python recipes/bench/linear_cross_entropy.py --output docs/benchmarks/linear_cross_entropy_cpu.md
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from page import Page, add_medians, describe_run, fill, finish, markdown_table, quietness
from rich.console import Console
from tiled_loss import Contender, run_once

from hf_longctx.losses.tiled_logits import tiled_cross_entropy
from hf_longctx.losses.tiles import choose_tile_size


# (precision, tokens, words, share of ignored labels)
ROWS = (
    ("float32", 2048, 32768, 0.0),
    ("float32", 4096, 32768, 0.0),
    ("float32", 1024, 131072, 0.0),
    ("float32", 2048, 32768, 0.5),
    ("bfloat16", 1024, 32768, 0.0),
)
CHECK_TOKENS, CHECK_WORDS, CHECK_WIDTH, CHECK_TILE = 700, 20011, 128, 64
PRECISIONS = ("float64", "float32", "float32, autocast", "bfloat16", "float16")
COLUMNS = {
    "precision": "{dtype}",
    "tokens": "{tokens:,}",
    "words": "{vocab:,}",
    "ignored": "{ignored:.0%}",
    "loss": "{label}",
    "s": "{seconds:.2f}",
    "CPU s": "{cpu_seconds:.2f}",
    "CPU time": "{cpu_ratio:.2f}",
    "step GB": lambda row: f"{row['step_bytes'] / 1e9:.2f}",
    "above GB": lambda row: f"{row['above_bytes'] / 1e9:.2f}",
    "others": "{other_load:.0%}",
}
NUMBER_COLUMNS = {
    "precision": "{precision}",
    "loss": "{label}",
    "returned in": "{dtype}",
    "error of the loss": "{loss_error:.1e}",
    "error of the worst gradient": "{gradient_error:.1e}",
}
console = Console(width=max(Console().width, 150))

READING = """\
- *s*: forward and backward, median of {rounds} rounds; torch's with its own chunks once, for its memory.
- *CPU s*: processor seconds, which other programs disturb less.
- *CPU time*: ratio to ours on the same row.
- *step GB*: the most memory the step held beyond hidden states and weights. *above GB*: the same less the gradients
  that any contender must return.
- *others*: the share of the cores that other programs used during the step, median.
- Errors are relative norms against whole logits in float64, of the same rounded inputs. Under autocast a head
  multiplies in bfloat16, so an error of that size is the right one there.
"""

WHY = """\
- **Half precision, in which models are trained.** Torch's adds the chunks up in the precision of the hidden states,
  the loss in bfloat16 and the gradient of the weight in both half precisions, so it rounds once a chunk: the smaller
  the chunks, the larger the error. Ours adds in float32 and rounds the gradient once.
- **Autocast.** Torch's takes no part in it: float32 weights are multiplied in float32, a head's in bfloat16.
- **Ignored labels.** Torch's computes them like any other token: a prompt or padding costs what a target costs.
- **Label smoothing.** Torch's makes whole logits, with a warning.
- **A word masked by a bias of minus infinity.** Inside torch's an ignored token stands for word 0; where that one is
  masked, the loss is not a number.
- **What is left** is float32 without autocast, ignored labels and label smoothing. There torch's with our tile size
  gives the same numbers in the same time and memory. With its own chunks it takes more time, and less memory where the
  vocabulary is small, as ours does with a smaller `tile_size`; never less than one more gradient of the weight, since
  its backward makes one of zeros. A second path, for some inputs on some versions of torch, would bring nothing.
- Alike in both: one backward, hooks of a parameter run once, a frozen weight gets no gradient, runs repeat bit for
  bit, a sharded weight (`DTensor`) is refused.

`tests/unit/test_linear_cross_entropy.py` compares the two and holds these points, so that it fails when torch's
changes; the sharded weight was tried by hand. Not measured: CUDA, where torch's has other defaults.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="size of a hidden state, D")
    parser.add_argument("--cores", type=int, default=1, help="threads of every contender")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the table shows their median")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    args = parser.parse_args(arguments)
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no `linear_cross_entropy`: install torch 2.13 or newer.")
    args.device, args.one_process = "cpu", False
    return args


# Same numbers


def chunked(hidden, weight, labels, bias=None, chunk: int | None = CHECK_TILE, **options):
    """Torch's, in chunks of `chunk` tokens or of its own choice."""
    options = {"reduction": "sum", "options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk), **options}
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, **options)


LOSSES = {
    "whole logits": lambda h, w, y, b: F.cross_entropy(_wide(F.linear(h, w, b)), y, reduction="sum"),
    "ours": lambda h, w, y, b: tiled_cross_entropy(h, w, y, bias=b, num_items=1, tile_size=CHECK_TILE),
    "torch's, our tiles": chunked,
    "torch's": lambda h, w, y, b: chunked(h, w, y, b, chunk=None),
}


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def draw(dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(hidden states, weight and bias, labels), a third of them ignored; logits of a trained model's size."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((CHECK_TOKENS, CHECK_WIDTH), (CHECK_WORDS, CHECK_WIDTH), (CHECK_WORDS,))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[1].mul_(2 * CHECK_WIDTH**-0.5)
    labels = torch.randint(CHECK_WORDS, (CHECK_TOKENS,), generator=generator)
    labels[torch.rand(CHECK_TOKENS, generator=generator) < 0.3] = -100
    return tuple(x.to(dtype).requires_grad_() for x in inputs), labels


def compare_numbers() -> list[dict]:
    """Errors of every loss in every precision."""
    found = []
    for precision in PRECISIONS:
        inputs, labels = draw(getattr(torch, precision.split(",")[0]))
        count = int((labels != -100).sum())
        exact = tuple(x.detach().double().requires_grad_() for x in inputs)
        mean = LOSSES["whole logits"](exact[0], exact[1], labels, exact[2]) / count
        wanted = torch.autograd.grad(mean, exact)
        for label, loss_of in LOSSES.items():
            autocast = torch.autocast("cpu", torch.bfloat16) if "autocast" in precision else contextlib.nullcontext()
            with autocast:
                loss = loss_of(inputs[0], inputs[1], labels, inputs[2]) / count
            gradients = torch.autograd.grad(loss, inputs)
            errors = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(gradients, wanted)]
            found.append(
                {
                    "precision": precision,
                    "label": label,
                    "dtype": str(loss.dtype).removeprefix("torch."),
                    "loss_error": abs(loss.item() / mean.item() - 1),
                    "gradient_error": max(errors),
                }
            )
    return found


# Behaviour


def compare_behaviour() -> list[tuple[str, str, str]]:
    """(what is asked for, what ours gives, what torch's gives), each of them tried."""
    (hidden, weight, bias), labels = draw(torch.float32)
    none = torch.full_like(labels, -100)
    masked = bias.detach().clone()
    masked[0] = -torch.inf
    others = labels.where(labels != 0, 1)  # no target is masked

    def ours(targets=labels, head_bias=bias, **options):
        return tiled_cross_entropy(hidden, weight, targets, bias=head_bias, tile_size=CHECK_TILE, **options)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chunked(hidden, weight, labels, bias, label_smoothing=0.1)
    smoothing = "whole logits, with a warning" if caught else "in chunks"
    return [
        ("label smoothing", "in tiles", smoothing),
        ("no valid label, mean", _shown(ours(none)), _shown(chunked(hidden, weight, none, bias, reduction="mean"))),
        (
            "word 0 masked by a bias of -inf, ignored labels",
            _shown(ours(others, masked, num_items=1)),
            _shown(chunked(hidden, weight, others, masked)),
        ),
    ]


def _shown(loss: torch.Tensor) -> str:
    return f"{loss.item():.6g}"


# Bytes and time


def measure_all(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Rounds of every contender on every row, interleaved; one entry a row and contender."""
    rows = []
    for dtype, tokens, vocab, ignored in ROWS:
        contenders = (
            Contender("ours", "ours"),
            Contender("torch's, our tiles", "torch", choose_tile_size(None, vocab)),
            Contender("torch's", "torch"),
        )
        facts = {"dtype": dtype, "tokens": tokens, "vocab": vocab, "ignored": ignored}
        rows += [{**facts, "label": c.label, "contender": c, "runs": []} for c in contenders]
    for index in range(args.repeats):
        for row in rows:
            if index and row["label"] == "torch's":
                continue  # slow, and no candidate: once, for its memory
            settings = argparse.Namespace(**{**vars(args), **row})
            run = run_once(row["contender"], row["tokens"], settings, folder, compare=False)
            if "failed" in run:
                raise RuntimeError(f"{row['label']} failed: {run['failed']}")
            row["runs"].append(run)
            shown = f"{row['dtype']}, {row['tokens']:,} tokens, {row['vocab']:,} words: {row['label']}"
            console.print(f"round {index + 1}: {shown}: {run['seconds']:.2f} s", highlight=False)
    for row in rows:
        del row["contender"]
    return rows


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians to each entry, and its ratio to ours on the same row."""
    for row in rows:
        add_medians(row, row["runs"], cores, ("step_bytes", "above_bytes"))
        if row["label"] == "ours":
            reference = row
        row["cpu_ratio"] = row["cpu_seconds"] / reference["cpu_seconds"]


def page_of(result: dict) -> Page:
    """The page of a run."""
    return Page(
        title="Torch's `linear_cross_entropy` and ours on a CPU",
        intro=[
            "Torch 2.13 has a chunked cross entropy that makes its gradients in the forward, as `tiled_cross_entropy` "
            "does. This page compares the two and says why ours stays.",
            "## Numbers",
            f"{CHECK_TOKENS} tokens of size {CHECK_WIDTH}, {CHECK_WORDS:,} words, a bias, 30% of the labels ignored.",
            markdown_table(NUMBER_COLUMNS, (fill(NUMBER_COLUMNS, row) for row in result["numbers"])),
            markdown_table(("asked for", "ours", "torch's"), map(list, result["behaviour"])),
            "## Bytes and time",
            f"One row of random hidden states of size {result['settings']['width']}, {result['settings']['cores']} "
            "thread; hidden states and weights are trained.",
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[quietness(result, "*s*", " (medians)")],
        reading=READING.format(rounds=result["settings"]["repeats"]),
        sections={"Why ours stays": WHY},
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.cores)
    numbers, behaviour = compare_numbers(), compare_behaviour()
    for row in numbers:
        console.print(" · ".join(fill(NUMBER_COLUMNS, row)), highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(args, Path(folder))
    summarize(rows, os.cpu_count())
    result = describe_run("linear_cross_entropy", arguments, args, ("hf-longctx", "torch", "transformers"), rows)
    result |= {"numbers": numbers, "behaviour": behaviour}
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

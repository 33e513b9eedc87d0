"""`hf-longctx verify`: a table of the proof, and an exit code for a script.

0 exact, 1 wrong, 2 refused with the message, 3 could not be built.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING

from ..config.run import INNER_ATTENTIONS
from ..proof.result import EXACT, EXIT_CODES, REFUSED, UNBUILDABLE, WRONG, RowsResult, VerifyResult


if TYPE_CHECKING:
    from rich.console import Console

    from .answer import Answer

_STYLES = {EXACT: "bold green", WRONG: "bold red", REFUSED: "bold yellow", UNBUILDABLE: "bold yellow"}
_WORDS = {EXACT: "exact", WRONG: "WRONG", REFUSED: "refused", UNBUILDABLE: "could not be built"}
_TABLE_WIDTH = 150


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    parser = commands.add_parser("verify", help="prove that a model shared by processes is the model of one process")
    kernels = f"{', '.join(INNER_ATTENTIONS)} (against itself)"
    parser.add_argument("model", help="hub id, folder or model type such as qwen3")
    parser.add_argument(
        "--sequence_parallel_size", type=int, default=2, metavar="P", help="processes that share one sequence"
    )
    parser.add_argument("--data_parallel_size", type=int, default=1, help="groups of them")
    parser.add_argument("--inner_attention", default="auto", help=f"kernel that `ulysses` runs: {kernels}")
    parser.add_argument("--packed", action="store_true", help="packed rows too, and pairs without padding")
    parser.add_argument("--wrapper", default="none", help="none, ddp or fsdp2: who averages gradients")
    parser.add_argument("--dtype", default="float32", help="float32 (doubts are settled in float64) or float64")
    parser.add_argument(
        "--task",
        help="causal-lm, masked-lm, multimodal-lm or encoder, for a type that is several; or embedding, dpo or "
        "reward; default: what it is first of all",
    )
    parser.add_argument("--bidirectional", action="store_true", help="with --task embedding: no causal mask")
    parser.add_argument("--ttt", action="store_true", help="the type with fast weights (TTT-E2E), in one process")
    parser.add_argument("--full", action="store_true", help="the model's own size and weights, not a tiny random one")
    parser.add_argument("--sleep", action="store_true", help="that it sleeps exactly instead: one process, tiny model")
    return parser


def run(options: argparse.Namespace, answer: Answer) -> int:
    """Print the proof and return the exit code."""
    from ..proof.model_under_test import Setting, validate_task
    from ..proof.verification import verify

    console = answer.console
    console.width = max(console.width, _TABLE_WIDTH)
    if options.sleep:
        return _run_sleep(answer, options)
    setting = Setting(
        options.sequence_parallel_size,
        options.data_parallel_size,
        options.inner_attention,
        wrapper=options.wrapper,
        dtype=options.dtype,
    )
    validate_task(options.task, options.bidirectional)
    if options.ttt:
        return _verify_fast_weights(answer, options)
    cores = os.cpu_count() or 1
    if setting.world_size > cores:
        answer.print(f"warning: {setting.world_size} processes on {cores} cores take turns: right, but slow")
    names = ("sequence_parallel_size", "data_parallel_size", "inner_attention", "packed", "wrapper", "dtype", "full")
    settings = {name: getattr(options, name) for name in (*names, "bidirectional")}
    try:
        with answer.working(f"{setting.world_size} processes and {options.model}"):
            result = verify(options.model, task=options.task, **settings)
    except ValueError as error:
        return _end(answer, UNBUILDABLE, str(error))
    _print(console, options, result)
    answer.facts |= result.to_dict()
    answer.outcome, answer.message = result.outcome, result.message
    return result.exit_code


def _verify_fast_weights(answer: Answer, options: argparse.Namespace) -> int:
    from rich.table import Table

    from ..proof.fast_weights import verify_fast_weights

    try:
        with answer.working(f"fast weights in {options.model}"):
            result = verify_fast_weights(options.model)
    except ValueError as error:
        return _end(answer, UNBUILDABLE, str(error))
    table = Table("fast weights", "worst error", "allowed (float64)", box=None)
    for check in result.checks:
        table.add_row(check.name, f"{check.error:.1e}", f"{check.allowed:.0e}")
    answer.print(f"{result.model} (tiny random weights), one process")
    if result.checks:
        answer.console.print(table)
    answer.facts |= dataclasses.asdict(result)
    return _end(answer, result.outcome, result.message or f"{len(result.checks)} rows in {result.seconds:.1f} s")


def _run_sleep(answer: Answer, options: argparse.Namespace) -> int:
    """The proof of [`verify_sleep`][hf_longctx.proof.sleeping]: a line a property, and its exit code."""
    from ..proof.sleeping import verify_sleep

    try:
        with answer.working(f"windows and passes of {options.model}"):
            result = verify_sleep(options.model)
    except ValueError as error:
        return _end(answer, UNBUILDABLE, str(error))
    for name, off in result.errors.items():
        answer.print(f"{name:20} off by {off:.1e}, allowed {result.allowed[name]:.1e}")
    answer.facts |= result.to_dict()
    return _end(answer, result.outcome, result.message or "windows, states, gradients, rows and generation")


def _end(answer: Answer, outcome: str, message: str) -> int:
    from rich.markup import escape

    answer.outcome, answer.message = outcome, "" if outcome == EXACT else message
    answer.console.print(f"[{_STYLES[outcome]}]{_WORDS[outcome]}[/]: {escape(message)}")
    return EXIT_CODES[outcome]


def _print(console: Console, options: argparse.Namespace, result: VerifyResult) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    groups = result.world_size // result.sequence_parallel_size
    size = "its own weights" if options.full else "tiny random weights"
    embeds = result.task == "embedding"
    reference = "padded rows" if embeds else "whole rows"
    console.print(
        f"{result.model} ({result.task}, {size}): {groups} x {result.sequence_parallel_size} processes share rows, "
        f"against 1 process on {reference}; wrapper {options.wrapper}",
        markup=False,
    )
    plain = not console.is_terminal
    table = Table(box=box.SIMPLE if plain else box.ROUNDED, show_edge=not plain)
    outputs = "embeddings" if embeds else "outputs"
    columns = ("rows", "loss", outputs, "worst gradient", "of parameter", "eval", "allowed", "outcome", "seconds")
    for name in columns:
        table.add_column(name, justify="left" if name in ("rows", "of parameter", "outcome") else "right")
    for rows in result.rows:
        table.add_row(*_cells(rows))
    console.print(table)
    baseline = [rows.baseline for rows in result.rows if rows.baseline is not None]
    if baseline and embeds:
        seen = ", ".join(f"{value:.1e}" for value in baseline)
        console.print(f"if texts saw each other, or ranks exchanged nothing, embeddings would be off by {seen}")
    elif baseline:
        console.print(f"without the exchange between processes the outputs would be off by {max(baseline):.1e}")
    full = [rows.full_attention for rows in result.rows if rows.full_attention is not None]
    if full:
        console.print(
            f"LSH attention is {min(full):.1e} to {max(full):.1e} off from full attention here, which is no fault"
        )
    noise = [rows.noise for rows in result.rows if rows.noise is not None]
    if noise:
        console.print(f"one process is off from itself by {max(noise):.1e} with other chunks of its recurrent layers")
    outcome = result.outcome
    message = f"{len(result.rows)} kinds of rows in {result.seconds:.1f} s" if result else result.message
    console.print(f"[{_STYLES[outcome]}]{_WORDS[outcome]}[/]: {escape(message)}")


def _cells(rows: RowsResult) -> list[str]:
    from rich.markup import escape

    outcome = f"[{_STYLES[rows.outcome]}]{_WORDS[rows.outcome]}[/]"
    seconds = f"{rows.seconds:.1f}"
    errors = rows.errors
    if errors is None:
        return [rows.rows, "-", "-", "-", "-", "-", "-", outcome, seconds]
    numbers = [f"{value:.1e}" for value in (errors.loss, errors.logits, errors.gradient)]
    allowed = f"{rows.tolerance:.1e} ({rows.dtype})"
    return [rows.rows, *numbers, escape(errors.parameter), f"{errors.evaluation:.1e}", allowed, outcome, seconds]

"""`hf-longctx pack`: what packing would do to a data set, before anything is trained."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .answer import Answer


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    parser = commands.add_parser("pack", help="say what packing would do to a data set")
    parser.add_argument(
        "dataset",
        help="folder of documents; jsonl, parquet or csv file; dataset on the Hub; or a name that recipes know: "
        "stdlib:, stdlib_functions:, package:NAME, docstrings:NAME, modules:NAME",
    )
    parser.add_argument("--max_tokens", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--split", default="train", help="split of the data set")
    parser.add_argument("--config_name", help="configuration of a dataset on the Hub; default: its only one")
    parser.add_argument(
        "--text_field",
        default="text",
        help="column of the text, where no column tells lengths; several with commas: each is a document of its own",
    )
    parser.add_argument(
        "--model_name_or_path",
        help="hub id, folder or package:NAME of the tokenizer that counts; default: none, so that a column must tell "
        "lengths",
    )
    parser.add_argument("--streaming", action="store_true", help="read the data set without downloading it first")
    parser.add_argument("--limit", type=int, help="look at the first documents only; default: at all")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a padded batch, to compare with")
    parser.add_argument("--hidden_size", type=int, default=1024, help="of the model, for the estimate")
    parser.add_argument(
        "--long_documents", default="split", help="for one over --max_tokens: error, split or truncate"
    )
    parser.add_argument("--output", help="picture to draw, .png or .svg; default: none")
    return parser


def run(options: argparse.Namespace, answer: Answer) -> int:
    """Print the report, draw the picture and return the exit code: 0, or 2, with the message, on bad input."""
    from .pack_report import report_packing, validate_options

    validate_options(options)
    report_packing(answer, options)
    return 0

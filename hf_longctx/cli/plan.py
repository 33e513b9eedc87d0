"""`hf-longctx plan`: what fits on which GPUs, before anything is rented, and the file that makes it so.

Every memory preset is simulated for every number of GPUs that may share a row, from the configuration
alone. Memory is planned; the time is an estimate that counts operations.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..config.run import INNER_ATTENTIONS


if TYPE_CHECKING:
    from .answer import Answer

# A terminal that is narrower wraps whole lines; what is piped is as wide as it must be.
_TABLE_WIDTH, _PIPED_WIDTH = 120, 1000


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    parser = commands.add_parser("plan", help="say which rows fit on which GPUs, and write the file of the run")
    parser.add_argument("model", help="hub id, folder or config.json; only the configuration is read")
    parser.add_argument("--gpus", type=int, default=1, help="all GPUs of the run; nodes have 8")
    parser.add_argument("--gpu_memory", type=float, default=80, help="GiB of one GPU")
    parser.add_argument(
        "--cpu_memory",
        type=float,
        help="GiB of CPU memory of one node, for offloaded checkpoints; default: as much as they take",
    )
    parser.add_argument(
        "--target_tokens",
        help="tokens of a row that must fit, such as 131072, 128K, 1M or 1e6; default: the longest that fits",
    )
    parser.add_argument("--optimizer", default="adamw", help="adamw, adafactor, sgd, or lora: AdamW on adapters")
    parser.add_argument(
        "--task",
        default="sft",
        help="sft, dpo (pairs, and a reference model) or reward (pairs)",
    )
    parser.add_argument("--precompute_ref_log_probs", action="store_true", help="with dpo: no reference model")
    parser.add_argument(
        "--inner_attention",
        default="auto",
        help=f"{', '.join(INNER_ATTENTIONS)}; all but lsh are planned as a flash kernel",
    )
    parser.add_argument("--wrapper", help="fsdp2 (default for several GPUs), ddp, or none (default for one)")
    parser.add_argument("--peak_tflops", type=float, default=989, help="of one GPU in bf16, for the estimated time")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of that peak that is reached")
    parser.add_argument("--reversible", action="store_true", help="with reversible layers, and which sizes would fit")
    parser.add_argument(
        "--save_seconds",
        type=float,
        help="that a checkpoint takes, as a run has logged it; default: an estimate by its size",
    )
    parser.add_argument(
        "--hours_between_failures",
        type=float,
        help="of the whole run, for how often to save; default: an estimate by the number of GPUs",
    )
    parser.add_argument("--measure", action="store_true", help="run one short step here and correct the plan by it")
    parser.add_argument("--output", help="picture to draw, .png or .svg; default: none")
    parser.add_argument(
        "--write", help="YAML file to write for `hf-longctx` and the task; never written over; default: none"
    )
    return parser


def run(options: argparse.Namespace, answer: Answer) -> int:
    """Print the plan, draw and write what is asked for, and return the exit code: 2, with the message, if refused."""
    from .plan_search import plan_rows

    console = answer.console
    console.width = max(console.width, _TABLE_WIDTH if console.is_terminal else _PIPED_WIDTH)
    try:
        plan_rows(answer, options)
    except RuntimeError as error:  # of a model that cannot be simulated
        return answer.refuse(error)
    return 0

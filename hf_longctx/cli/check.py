"""`hf-longctx check`: whether a model can be sharded, and who gets which heads; only its configuration is read.

A type is answered from the table of all types where it was proven on the installed transformers, and by the proof of a
tiny model where it was not.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..config.lsh_settings import LSH
from ..config.run import INNER_ATTENTIONS


if TYPE_CHECKING:
    from ..parallel.heads import HeadSplit
    from .answer import Answer

# As `proof` has them, which would import libraries here; a test compares.
TASKS = ("causal-lm", "masked-lm", "multimodal-lm", "encoder")
# A table of more ranks says less than one line.
_MOST_ROWS = 8


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    parser = commands.add_parser(
        "check",
        help="say whether a model can be sharded, and who gets which heads",
        description="Say whether a model can be sharded, who gets which heads, and how that is known: from the table "
        "of all types in this package, or else from the proof of a tiny model, which takes some seconds. Exit code 0: "
        "it can; 2: refused; 3: a type of which no model can be proven.",
    )
    parser.add_argument("model", help="hub id, folder or model type; only its configuration is read")
    parser.add_argument(
        "--sequence_parallel_size", type=int, default=2, metavar="P", help="processes that share one sequence"
    )
    kernels = ", ".join(INNER_ATTENTIONS)
    parser.add_argument(
        "--inner_attention", default="auto", help=f"kernel that `ulysses` runs on its heads: {kernels}"
    )
    parser.add_argument("--task", choices=TASKS, help="for a type that is several; default: what it is first of all")
    parser.add_argument("--no_proof", action="store_true", help="start no processes where the table does not know")
    parser.add_argument("--sleep", action="store_true", help="say whether the model can sleep instead, and where")
    parser.add_argument("--window", type=int, default=2048, help="with --sleep: tokens of a window")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code a hub model brings")
    return parser


def run(options: argparse.Namespace, answer: Answer) -> int:
    """Print who gets which heads and return the exit code: 2, with the message, if the model is refused."""
    from ..proof.result import EXACT, REFUSED, UNBUILDABLE
    from .check_model import NoDefaultsError, prove, read_model, split_of, table_evidence

    size = options.sequence_parallel_size
    answer.facts |= {"model": options.model, "sequence_parallel_size": size, "can_be_sharded": False}
    if options.sleep:
        return _check_sleep(options, answer)
    try:
        model = read_model(options)
    except NoDefaultsError as error:
        return _unbuildable(answer, str(error))
    answer.facts |= {"model_type": model.config.model_type, "task": model.task}
    evidence = table_evidence(model, options) if size > 1 else None
    if evidence is None or evidence.outcome == EXACT:
        split, gathering = split_of(model, options)
    if evidence is None and size > 1:  # what reading refuses needs no processes
        evidence = prove(model, options, answer)
    if evidence is not None:
        answer.facts["proof"] = evidence.facts()
        if evidence.outcome == REFUSED:
            return answer.refuse(evidence.message)
        if evidence.outcome == UNBUILDABLE and model.is_type:
            return _unbuildable(answer, evidence.message)
    answer.facts |= {"can_be_sharded": True, **_heads(split), "gathering_layers": gathering}
    answer.console.print(f"[bold green]can be sharded[/] over {size} processes")
    if split is not None:
        _print_heads(answer, split)
    if gathering:
        answer.print(
            f"{gathering} layers attend to what an indexer picks or a compressor makes: they gather keys or entries "
            "of the whole row and keep all their heads"
        )
    if options.inner_attention == LSH:
        answer.print("LSH attention: call `hf_longctx.tie_query_key(model)` on a new model")
    if evidence is not None:
        answer.print(evidence.told)
    if evidence is None or evidence.outcome != EXACT:
        answer.print("A tiny forward is compared with one process when a trainer starts.")
    return 0


def _unbuildable(answer: Answer, message: str) -> int:
    from ..proof.result import EXIT_CODES, UNBUILDABLE

    answer.outcome, answer.message = UNBUILDABLE, message
    answer.console.print("[bold yellow]could not be built[/]:", end=" ")
    answer.print(f"{message} Nothing is proven of this type.")
    return EXIT_CODES[UNBUILDABLE]


def _heads(split: HeadSplit | None) -> dict[str, Any]:
    if split is None:
        return {"heads": None}
    ranks = [
        {"rank": rank, "query": list(query), "key_value": list(key)}
        for rank, (query, key) in enumerate(zip(split.query, split.key_value))
    ]
    return {
        "num_query_heads": split.num_query_heads,
        "num_key_value_heads": split.num_key_value_heads,
        "key_value_sent": split.replication(),
        "heads": ranks,
    }


def _print_heads(answer: Answer, split: HeadSplit) -> None:
    from rich.table import Table

    sent = f"sent {split.replication():.2f} times each"
    counts = [(query[1] - query[0], key[1] - key[0]) for query, key in zip(split.query, split.key_value)]
    if len(set(counts)) == 1:
        query, key_value = counts[0]
        heads = f"{query} of {split.num_query_heads} query heads and {key_value} of {split.num_key_value_heads}"
        answer.print(f"each gets {heads} key/value heads, which are {sent}")
        return
    if len(counts) > _MOST_ROWS:
        mine, theirs = (_between([count[place] for count in counts]) for place in (0, 1))
        heads = f"{mine} of {split.num_query_heads} query heads and {theirs} of {split.num_key_value_heads}"
        answer.print(f"each gets {heads} key/value heads, which are {sent}; `--json` lists every rank's")
        return
    table = Table("rank", "query heads", "key/value heads")
    for rank, parts in enumerate(zip(split.query, split.key_value)):
        table.add_row(str(rank), *(f"{begin}..{end - 1}" for begin, end in parts))
    answer.console.print(table)
    answer.print(f"key/value heads are {sent}")


def _between(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _check_sleep(options: argparse.Namespace, answer: Answer) -> int:
    """Say whether a model type, folder or hub id can sleep: its own configuration, and a tiny model of it."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..config.sleep import SleepConfig
    from ..proof.model_under_test import read_config
    from ..proof.sleeping import check_tiny
    from ..sleep.sleepers import check_sleeper, state_layers

    del answer.facts["can_be_sharded"]
    answer.facts["can_sleep"] = False
    config = read_config(options.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = SleepConfig(window=options.window)
    check_sleeper(model, wanted)
    check_tiny(config, wanted)
    states = state_layers(model)
    answer.facts |= {"can_sleep": True, "state_layers": list(states), "num_layers": len(model.base_model.layers)}
    answer.console.print(
        f"[bold green]can sleep[/]: {len(states)} of {len(model.base_model.layers)} layers hold a recurrent state "
        f"({', '.join(map(str, states))})."
    )
    answer.print(f"`hf-longctx verify {options.model} --sleep` proves it on a tiny model.")
    return 0

"""`hf-longctx`: look before a run, and run.

`env` prints what is installed, `check` says whether and how a model is sharded, `pack` what packing would do to a
data set, `plan` what fits on which GPUs, `verify` proves that sharding is exact, `ttt` adds fast weights to a model.
`sft`, `pretrain`, `dpo`, `reward`, `kto` and `embed` train; `run` starts any other script with our attention names.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from . import check, completion, env, pack, plan, run_program, ttt, verify
from .answer import Answer, add_json
from .parser import CommandParser
from .train import TASKS, TrainingCommand


# A command has `add_parser(commands)`, which must import nothing that takes time, and `run(options, answer)`.
COMMANDS: tuple[Any, ...] = (
    env,
    check,
    pack,
    plan,
    verify,
    ttt,
    *map(TrainingCommand, TASKS),
    run_program,
    completion,
)
# Their output is a program's own.
_WITHOUT_JSON = (run_program, completion)
# What wrong input raises; other errors are faults.
_EXPECTED = (ValueError, NotImplementedError, ImportError, OSError)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code."""
    options = _parse(sys.argv[1:] if arguments is None else list(arguments))
    if options.run in [command.run for command in _WITHOUT_JSON]:
        return options.run(options)
    if options.takes_more:  # imports nothing of its own before the recipe's libraries
        return options.run(options)
    answer = Answer(options)
    try:
        answer.validate()
        code = options.run(options, answer)
    except _EXPECTED as error:
        code = answer.refuse(error)
    return answer.end(code)


def build_parser() -> CommandParser:
    """The parser of all commands."""
    parser = CommandParser(prog="hf-longctx", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="command", parser_class=CommandParser, title="commands"
    )
    for command in COMMANDS:
        chosen = command.add_parser(commands)
        leaves = chosen.subcommands() or [chosen]
        for leaf in leaves:
            if command not in _WITHOUT_JSON:
                add_json(leaf)
            own = leaf.get_default("takes_more")
            takes_more = getattr(command, "takes_more", False) if own is None else own
            leaf.set_defaults(run=leaf.get_default("run") or command.run, takes_more=takes_more, parser=leaf)
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    options, more = build_parser().parse_known_args(words)
    if more and not options.takes_more:
        options.parser.refuse(more)
    options.more = more
    return options


class _Version(argparse.Action):
    def __call__(self, parser, *_: object) -> None:
        from .. import __version__

        sys.stdout.write(f"hf-longctx {__version__}\n")
        parser.exit()

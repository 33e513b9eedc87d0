"""`hf-longctx`: look before a run, and run. `env` prints what is installed, `check` says whether and how a model is
sharded, `pack` what packing would do to a data set, `plan` what fits on which GPUs, `ttt` adds fast weights to a
model, `verify` proves that sharding is exact; `sft`, `pretrain`, `dpo`, `reward` and `embed` train."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any

from . import check, env, pack, plan, ttt, verify
from .train import TASKS, TrainingCommand


# A command has `add_parser(commands)`, which must import nothing that takes time, and `run(options)`.
COMMANDS: tuple[Any, ...] = (env, check, pack, plan, ttt, verify, *map(TrainingCommand, TASKS))


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code."""
    parser = _Parser(prog="hf-longctx", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    for command in COMMANDS:
        chosen = command.add_parser(commands)
        chosen.set_defaults(run=command.run, takes_more=getattr(command, "takes_more", False), parser=chosen)
    options, more = parser.parse_known_args(arguments)
    if more and not options.takes_more:
        options.parser.refuse(more)
    options.more = more
    return options.run(options)


class _Parser(argparse.ArgumentParser):
    """Help in 80 columns with defaults, and the nearest name for a wrong one."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **kwargs})

    def refuse(self, words: list[str]) -> None:
        """End with what was not known and the nearest argument."""
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(words[0].partition("=")[0], known, 1)
        self.error(f"unrecognized arguments: {' '.join(words)}{f'; did you mean {near[0]}?' if near else ''}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices or ()], 1)
            if near:
                error.message += f"; did you mean {near[0]}?"
            raise


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=79)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if (
            text
            and action.option_strings
            and default not in (None, False, argparse.SUPPRESS)
            and "default" not in text
        ):
            return f"{text} (default: %(default)s)"
        return text


class _Version(argparse.Action):
    def __call__(self, parser, *_: object) -> None:
        from .. import __version__

        sys.stdout.write(f"hf-longctx {__version__}\n")
        parser.exit()

"""`hf-longctx`: look before a run. `env` prints what is installed, `check` says whether and how a model is sharded,
`pack` what packing would do to a data set, `plan` what fits on which GPUs, `verify` proves that sharding is exact."""

from __future__ import annotations

import argparse

from . import check, env, pack, plan, verify


# A command is a module with `add_parser(commands)`, which must import nothing that takes time, and `run(options)`.
COMMANDS = (env, check, pack, plan, verify)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hf-longctx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    return options.run(options)

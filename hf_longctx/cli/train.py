"""`hf-longctx sft | pretrain | dpo | reward | embed`: train from an installed package, on one process or many.

The bodies are those of `recipes/*.py`, and so are the arguments: `--config run.yaml`, or any of them by name.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path


TASKS = {
    "sft": "fine-tune on documents or conversations",
    "pretrain": "train on rows of an exact length",
    "dpo": "train on preferred and rejected answers",
    "reward": "train a model that scores answers",
    "embed": "train an embedding model on many sources",
}
# What a wrong file, setting or model raises. Others are faults, and are shown with where they come from.
_EXPECTED = (ValueError, NotImplementedError, ImportError, OSError)


class TrainingCommand:
    """The command of one task; like the other commands' modules it has `add_parser` and `run`.

    Args:
        task (`str`): one of [`TASKS`].
    """

    takes_more = True

    def __init__(self, task: str) -> None:
        self.task = task

    def add_parser(self, commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
        """Add the command's name and help; every argument but the launcher's is the task's own."""
        parser = commands.add_parser(
            self.task,
            help=TASKS[self.task],
            description=f"{TASKS[self.task].capitalize()}: `hf-longctx {self.task} --config run.yaml`. Arguments of "
            "the trainer, of the model and of this package may stand in the file or behind the command; --help_all "
            "lists them.",
            allow_abbrev=False,
        )
        parser.add_argument("--config", help="YAML file of the run")
        parser.add_argument(
            "--accelerate_config",
            help="launch settings: ddp_1node, fsdp2_8gpu, fsdp2_2nodes, or a file; default: this process alone, or "
            "those that torchrun or accelerate started",
        )
        parser.add_argument("--num_processes", help="processes to launch, instead of those of the settings")
        parser.add_argument("--help_all", action="store_true", help="print all arguments of the task")
        return parser

    def run(self, options: argparse.Namespace) -> int:
        """Train, or launch processes that do; returns the exit code: 2, with the message, on bad input."""
        words = list(options.more)
        if options.help_all:
            words.append("--help")
        if options.config is not None:
            words = ["--config", options.config, *words]
        try:
            if options.accelerate_config is not None:
                return _launch(self.task, options.accelerate_config, options.num_processes, words)
            if options.num_processes is not None:
                raise ValueError(
                    f"`--num_processes` ({options.num_processes}) is of a launch: name its settings with "
                    "`--accelerate_config`, or start the command with torchrun."
                )
            return run_task(self.task, words)
        except _EXPECTED as error:
            if not _is_ours(error):
                raise
            sys.stderr.write(f"refused: {error}\n")
            return 2


def run_task(task: str, words: list[str]) -> int:
    """Call the body of a recipe with the words of a command line."""
    module = importlib.import_module(f"..tasks.{task}", __package__)
    sys.argv = [f"hf-longctx {task}", *words]
    module.main()
    return 0


def _launch(task: str, settings: str, num_processes: str | None, words: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser

    from ..launch import find_settings

    given = ["--config_file", str(find_settings(settings))]
    given += [] if num_processes is None else ["--num_processes", num_processes]
    launch_command(launch_command_parser().parse_args([*given, "-m", __package__.partition(".")[0], task, *words]))
    return 0


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it: a sentence for the user, and no fault of a library."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).parents[1]
    return bool(frames) and package in Path(frames[-1].filename).parents

"""`hf-longctx sft | pretrain | dpo | ...`: train from an installed package, on one process or many.

The bodies are those of `recipes/*.py`, and so are the arguments: `--config run.yaml`, or any of them by name.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from ..tasks.commands import TASKS
from .answer import REFUSED, Answer
from .expected import sentence_of


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
        add_training_options(parser)
        return parser

    def run(self, options: argparse.Namespace) -> int:
        """Train, or launch processes that do; returns the exit code: 2, with the message, on bad input."""
        return run_here_or_launch(self.task, options)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add what a command that trains reads itself; all else is for its task."""
    parser.add_argument("--config", help="YAML file of the run; default: none, and all arguments stand here")
    parser.add_argument(
        "--accelerate_config",
        help="launch settings: ddp_1node, fsdp2_8gpu, fsdp2_2nodes, or a file; default: this process alone, or "
        "those that torchrun or accelerate started",
    )
    parser.add_argument("--num_processes", metavar="N", help="processes to launch; default: those of the settings")
    parser.add_argument("--help_all", action="store_true", help="print all arguments of the task")


def run_here_or_launch(task: str, options: argparse.Namespace) -> int:
    """Run a task with its options on this process, or on processes that are launched; returns the exit code."""
    words = list(options.more)
    if options.help_all:
        words.append("--help")
    if options.config is not None:
        words = ["--config", options.config, *words]
    if options.accelerate_config is None and options.num_processes is None:
        return run_task(task, words) if options.json is None else _answer(task, words, options)
    if options.json is not None:
        words = [f"--json={options.json}", *words]
    try:
        if options.accelerate_config is None:
            raise ValueError(
                f"`--num_processes` ({options.num_processes}) is of a launch: name its settings with "
                "`--accelerate_config`, or start the command with torchrun."
            )
        return _launch(task, options.accelerate_config, options.num_processes, words)
    except ValueError as error:
        return _refuse(str(error))


def run_task(task: str, words: list[str] | None = None) -> int:
    """Call the body of a recipe with the words of a command line; unset: those of this process.

    Returns:
        `int`: the exit code, 2 with the message where the input is refused. Faults are raised.
    """
    refused = _call(task, words)
    return 0 if refused is None else _refuse(refused)


def _call(task: str, words: list[str] | None) -> str | None:
    """Run the body; the sentence with which it refused its input, or `None`."""
    if words is not None:
        sys.argv = [f"hf-longctx {task}", *words]
    try:
        importlib.import_module(f"..tasks.{task}", __package__).main()
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        return sentence
    return None


def _refuse(sentence: str) -> int:
    sys.stderr.write(f"refused: {sentence}\n")
    return 2


def _answer(task: str, words: list[str], options: argparse.Namespace) -> int:
    """Run the body with all that it prints on stderr; the first process writes the JSON object."""
    answer = Answer(options)
    answer.facts["output_dir"] = None
    try:
        answer.validate()
        with contextlib.redirect_stdout(sys.stderr):
            refused = _call(task, words)
    except ValueError as error:
        refused = sentence_of(error)
        if refused is None:
            raise
    except SystemExit as stopped:  # of the parser, which has said why
        if not stopped.code:
            raise
        refused = "the command line is wrong: stderr says where."
    code = 0
    if refused is not None:
        code, answer.outcome, answer.message = _refuse(refused), REFUSED, refused
    folder = _value_of("output_dir", words)
    answer.facts["output_dir"] = folder
    if not code and folder is not None and Path(folder, "metrics.json").is_file():
        answer.facts["metrics"] = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
    return answer.end(code) if os.environ.get("RANK", "0") == "0" else code


def _value_of(name: str, words: list[str]) -> str | None:
    """Of an argument, from the command line or else the file behind `--config`."""
    for place, word in enumerate(words):
        if word == f"--{name}" and words[place + 1 : place + 2]:
            return words[place + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    if "--config" not in words[:-1]:
        return None
    import yaml

    try:
        content = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    value = content.get(name) if isinstance(content, dict) else None
    return None if value is None else str(value)


def _launch(task: str, settings: str, num_processes: str | None, words: list[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ..launch import find_settings

    given = ["--config_file", str(find_settings(settings))]
    given += [] if num_processes is None else ["--num_processes", num_processes]
    options = launch_command_parser().parse_args([*given, "-m", __package__.partition(".")[0], task, *words])
    try:
        launch_command(options)
    except ChildFailedError as error:  # each process has said why; the first one's exit code is the command's
        return error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0

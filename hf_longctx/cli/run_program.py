"""`hf-longctx run`: any script or command with our attention names, without a line of code.

The program is started as if `hf-longctx run` were not there, in an environment in which every Python process imports
hf_longctx first: also the processes that torchrun, accelerate or `trl sft` start.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path


NAME = "run"
STARTUP = Path(__file__).parents[1] / "startup"
# Commands that one may mean, where a name is none.
_KNOWN = ("python", "torchrun", "accelerate", "trl", "deepspeed", "axolotl", "llamafactory-cli", "swift")


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    parser = commands.add_parser(
        NAME,
        help="run any script or command with the attention names of this package",
        description="Run a script, a module (-m NAME) or a command with `attn_implementation` 'packed', 'ulysses' "
        "and 'lsh' known to every process that it starts: `hf-longctx run trl sft --attn_implementation packed ...`, "
        "`hf-longctx run torchrun --nproc_per_node 2 train.py`, `torchrun ... -m hf_longctx run train.py`. Rows are "
        "shared, and models adapted, by the trainers of this package or `hf_longctx.adapt` only.",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is the name of a module")
    parser.add_argument("program", help="script, module or command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments, passed on as they are")
    return parser


def run(options: argparse.Namespace) -> int:
    """Become the program; returns 2, with the message, where there is none."""
    try:
        words = words_of(options.program, options.module, options.arguments)
    except ValueError as error:
        sys.stderr.write(f"refused: {error}\n")
        return 2
    environment = environment_with_names()
    if os.name == "posix":  # no process in between, so that signals and the exit code are the program's own
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(words[0], words, environment)
    return subprocess.call(words, env=environment)


def words_of(program: str, is_module: bool, arguments: list[str]) -> list[str]:
    """What is started: Python on a script or module, or a command.

    Raises:
        ValueError: there is neither a file nor a command of this name.
    """
    if is_module:
        return [sys.executable, "-m", program, *arguments]
    path = Path(program)
    if path.is_dir() and (path / "__main__.py").is_file() or path.is_file() and _is_python(path):
        return [sys.executable, program, *arguments]
    # Commands of this environment come first, as its Python does.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = shutil.which(program, path=places)
    if command is not None:
        return [command, *arguments]
    files = [str(file.relative_to(".")) for file in sorted(Path(".").glob("*.py"))]
    near = difflib.get_close_matches(program, [*files, *_KNOWN], 1)
    hint = f"did you mean `{near[0]}`?" if near else "give a script, a command, or a module behind `-m`."
    raise ValueError(f"`{program}` is neither a Python file here nor a command: {hint}")


def environment_with_names() -> dict[str, str]:
    """This process's environment, in which Python imports hf_longctx when it starts."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(STARTUP)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(STARTUP), *paths])}


def _is_python(path: Path) -> bool:
    if path.suffix == ".py":
        return True
    return not os.access(path, os.X_OK)

"""The arguments of a recipe: its YAML file is read here first, so that a broken one is reported by line."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import yaml

from ..config.audiences import TRAINERS
from ..data.files import describe, read_text, shown
from .commands import COMMANDS


# Names that TRL's parser reads itself.
_OF_THE_PARSER = {"config", "env", "help"}
_CONFIGS = {kind for row in TRAINERS.values() for kind in row.values()}


def parse_recipe(arguments: Sequence[type]) -> tuple[Any, ...]:
    """What TRL's parser makes of the command line and the file behind `--config`, one object a class.

    Raises:
        ValueError: the file is none, is not UTF-8 or no YAML mapping; the message names file, line and column.
    """
    try:
        from trl import TrlParser
    except ImportError as error:
        raise ImportError("The recipes read their arguments with trl: `pip install hf-longctx[trl]`.") from error
    words = sys.argv[1:]
    check_names([*check_recipe_file(words), *_names_in(words)], arguments)
    try:
        return TrlParser(arguments).parse_args_and_config()
    except ValueError as error:  # of a dataclass that looks at its values
        raise ValueError(f"the arguments do not go together: {error}") from error


def given_names(words: Sequence[str]) -> set[str]:
    """The arguments that a command line or its file sets, by their names in a dataclass."""
    return {name.replace("-", "_") for name in (*read_recipe_file(words), *_names_in(words))}


def _names_in(words: Sequence[str]) -> list[str]:
    return [word[2:].partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]


def check_names(names: Sequence[str], arguments: Sequence[type]) -> None:
    """Raise `ValueError` for a name that no class of `arguments` has, with the nearest one, or the class that has it.

    Args:
        names (`Sequence[str]`): from the file or the command line.
        arguments (`Sequence[type]`): dataclasses of the recipe.
    """
    known = {name for kind in arguments for field in fields(kind) for name in (field.name, *_aliases(field))}
    for name in names:
        plain = name.replace("-", "_")
        if {name, plain, plain.removeprefix("no_")} & (known | _OF_THE_PARSER):
            continue
        owner = next((kind.__name__ for kind in _CONFIGS if plain in {field.name for field in fields(kind)}), None)
        commands = " and ".join(f"`hf-longctx {command}`" for command in commands_with(plain))
        if owner is not None:
            takes = f" and {commands} does: leave it out, or run that command." if commands else ": leave it out."
            raise ValueError(f"`{name}` is a setting of `{owner}`, which this recipe does not take{takes}")
        if commands:
            raise ValueError(
                f"`{name}` is no argument of this recipe, but of {commands}: leave it out, or run that command."
            )
        near = difflib.get_close_matches(plain, sorted(known), 1)
        remedy = f"did you mean `{near[0]}`?" if near else "leave it out."
        raise ValueError(f"`{name}` is no argument of this recipe: {remedy}")


def commands_with(name: str) -> list[str]:
    """The commands that have an argument of this name, of those whose libraries are here."""
    found = []
    for task, command in COMMANDS.items():
        try:
            kinds = importlib.import_module(f".{task}", __package__).ARGUMENTS
        except ImportError:
            continue
        if any(name in (field.name, *_aliases(field)) for kind in kinds for field in fields(kind)):
            found.append(command)
    return found


def _aliases(field: Field) -> list[str]:
    return [alias.lstrip("-").replace("-", "_") for alias in field.metadata.get("aliases", ())]


def check_recipe_file(words: Sequence[str]) -> list[str]:
    """The names in the YAML mapping of the file that follows `--config`; `ValueError` if it is none."""
    return list(read_recipe_file(words))


def read_recipe_file(words: Sequence[str]) -> dict[str, Any]:
    """The YAML mapping of the file that follows `--config`, empty without one; `ValueError` if it is none."""
    if "--config" not in words:
        return {}
    if words[-1] == "--config":
        raise ValueError("`--config` has no value: name the YAML file of the run behind it.")
    path = words[words.index("--config") + 1]
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"`{shown(path)}`{place} is no YAML ({said}): check the file at that place.") from error
    except RecursionError as error:
        raise ValueError(f"`{shown(path)}` is nested too deeply to be read: write plain names and values.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{shown(path)}` holds {describe(content)}, and not names with values: write `name: value`.")
    for name in content:
        if not isinstance(name, str):
            raise ValueError(f"`{shown(path)}` has the name {name!r}, which is no text: names are those of arguments.")
    return content


def parse_toy(kind: type, words: Sequence[str] | None = None) -> Any:
    """One dataclass from the command line and the file behind `--config`; needs no trl."""
    from transformers import HfArgumentParser

    words = list(sys.argv[1:] if words is None else words)
    content = read_recipe_file(words)
    check_names([*content, *_names_in(words)], (kind,))
    parser = HfArgumentParser(kind)
    parser.set_defaults(**content)
    if content:
        place = words.index("--config")
        del words[place : place + 2]
    return parser.parse_args_into_dataclasses(words)[0]


def refuse_earlier_numbers(folder: Path, *names: str) -> None:
    """Raise `ValueError` rather than write over the numbers of an earlier run."""
    for name in names:
        if (folder / name).exists():
            raise ValueError(f"`output_dir` ({folder}) holds the `{name}` of an earlier run: choose another folder.")

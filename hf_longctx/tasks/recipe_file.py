"""The arguments of a recipe: its YAML file is read here first, so that a broken one is reported by line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import yaml

from ..data.files import describe, read_text, shown


def parse_recipe(arguments: Sequence[type]) -> tuple[Any, ...]:
    """What TRL's parser makes of the command line and the file behind `--config`, one object a class.

    Raises:
        ValueError: the file is none, is not UTF-8 or no YAML mapping; the message names file, line and column.
    """
    from trl import TrlParser

    check_recipe_file(sys.argv[1:])
    return TrlParser(arguments).parse_args_and_config()


def check_recipe_file(words: Sequence[str]) -> None:
    """Raise `ValueError` unless what follows `--config` is a file with a YAML mapping."""
    if "--config" not in words:
        return
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

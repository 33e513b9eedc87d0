"""The parser of every command: help in 80 columns with defaults and choices, and the nearest name for a wrong one."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from .answer import STDOUT


_JSON = "--json"
_WIDTH = 79


class CommandParser(argparse.ArgumentParser):
    """An argument parser that helps.

    `--json` may stand before the model or data set, though it takes a file: where that one would be missing, the word
    behind `--json` is it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **kwargs})
        self._is_trying = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does; see above."""
        words = list(args or [])
        if _JSON not in words or self.subcommands():
            return super().parse_known_args(words, namespace)
        try:
            self._is_trying = True
            return super().parse_known_args(words, argparse.Namespace(**vars(namespace)) if namespace else None)
        except _Missing:
            self._is_trying = False
            words[words.index(_JSON)] = f"{_JSON}={STDOUT}"
            return super().parse_known_args(words, namespace)
        finally:
            self._is_trying = False

    def subcommands_by_name(self) -> dict[str, CommandParser]:
        """The parsers below this one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def subcommands(self) -> list[CommandParser]:
        """The same without names."""
        return list(self.subcommands_by_name().values())

    def refuse(self, words: list[str]) -> None:
        """End with what was not known and the nearest argument."""
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(words[0].partition("=")[0], known, 1)
        self.error(f"unrecognized arguments: {' '.join(words)}{f'; did you mean {near[0]}?' if near else ''}")

    def error(self, message: str) -> NoReturn:
        if self._is_trying and "required" in message:
            raise _Missing
        super().error(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices or ()], 1)
            if near:
                error.message += f"; did you mean {near[0]}?"
            raise


class _Missing(Exception):
    """A positional argument is not there."""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=_WIDTH)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Descriptions wrapped, a paragraph at a time."""
        fill = argparse.HelpFormatter._fill_text
        return "\n\n".join(fill(self, part, width, indent) for part in text.strip().split("\n\n"))

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

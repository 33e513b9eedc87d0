"""`hf-longctx completion bash | zsh | fish`: a script with which a shell completes commands and options.

It is made from the parsers, so it knows what they know, and completing starts no Python.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass


SHELLS = ("bash", "zsh", "fish")
_PROGRAM = "hf-longctx"
_HOW = {
    "bash": 'eval "$(hf-longctx completion bash)"     # in ~/.bashrc',
    "zsh": 'eval "$(hf-longctx completion zsh)"      # in ~/.zshrc, behind compinit',
    "fish": "hf-longctx completion fish | source      # in ~/.config/fish/config.fish",
}


@dataclass(frozen=True)
class Option:
    """One option: its name, its help in one line, whether a value follows, and which values there are."""

    name: str
    help: str
    takes_value: bool
    choices: tuple[str, ...]


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    parser = commands.add_parser(
        "completion",
        help="print the script with which a shell completes this command",
        description="Print a script for your shell:\n\n" + "\n\n".join(_HOW.values()),
    )
    parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the script; returns 0."""
    from .command_line import build_parser

    write = {"bash": bash, "zsh": zsh, "fish": fish}[options.shell]
    sys.stdout.write(write(dict(commands_of(build_parser()))))
    return 0


def commands_of(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list]]:
    """Words that lead to each parser, with its options; words that follow as ones without a value."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            found += [Option(name, _plain(told.get(name, "")), False, ()) for name in action.choices]
            for name, below in action.choices.items():
                yield from commands_of(below, (*path, name))
            continue
        choices = tuple(map(str, action.choices or ()))
        for name in action.option_strings:
            found.append(Option(name, _plain(action.help or ""), action.nargs != 0, choices))
        if not action.option_strings:
            found += [Option(choice, "", False, ()) for choice in choices]
    yield path, found


def bash(commands: dict[tuple[str, ...], list[Option]]) -> str:
    """For bash 3.2 and later."""
    words, values = [], []
    for path, options in commands.items():
        names = [option.name for option in options]
        flags = " ".join(name for name in names if name.startswith("-"))
        below = " ".join(name for name in names if not name.startswith("-"))
        words.append(f'    "{" ".join(path)}") flags="{flags}" below="{below}" ;;')
        values += [
            f'    "{" ".join(path)}:{option.name}") values="{" ".join(option.choices)}" ;;'
            for option in options
            if option.choices
        ]
    paths = " ".join(f'"{" ".join(path)}"' for path in commands if path)
    return f"""\
# {_HOW["bash"]}
_hf_longctx() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  local path="" word known next flags="" below="" values=""
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    next="${{path:+$path }}$word"
    for known in {paths}; do [ "$known" = "$next" ] && path="$next"; done
  done
  case "$path:$before" in
{chr(10).join(values)}
  esac
  case "$path" in
{chr(10).join(words)}
  esac
  if [ -n "$values" ]; then COMPREPLY=($(compgen -W "$values" -- "$current")); return; fi
  case "$current" in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$current")) ;;
    *) COMPREPLY=($(compgen -W "$below" -- "$current") $(compgen -f -- "$current")) ;;
  esac
}}
complete -o filenames -F _hf_longctx {_PROGRAM}
"""


def zsh(commands: dict[tuple[str, ...], list[Option]]) -> str:
    """For zsh, whose own emulation of bash's completion runs the same function."""
    return f"# {_HOW['zsh']}\nautoload -U +X bashcompinit && bashcompinit\n" + bash(commands).partition("\n")[2]


def fish(commands: dict[tuple[str, ...], list[Option]]) -> str:
    """For fish, with the help of every option."""
    lines = [f"# {_HOW['fish']}"]
    for path, options in commands.items():
        below = [other[len(path)] for other in commands if len(other) == len(path) + 1 and other[: len(path)] == path]
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in path)
        none = f"not __fish_seen_subcommand_from {' '.join(below)}" if below else ""
        when = "; and ".join(part for part in (seen, none) if part)
        for option in options:
            name = f"-l {option.name[2:]}" if option.name.startswith("--") else f"-a {option.name}"
            if option.name.startswith("-") and not option.name.startswith("--"):
                name = f"-s {option.name[1:]}"
            value = f" -x -a '{' '.join(option.choices)}'" if option.choices else " -r" if option.takes_value else ""
            told = f" -d '{option.help}'" if option.help else ""
            lines.append(f"complete -c {_PROGRAM} -n '{when}' {name}{value}{told}")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Help that may stand between quotes of a shell."""
    return text.replace("%%", "%").replace("\\", "").replace("'", "").replace("`", "")

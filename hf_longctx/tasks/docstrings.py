"""Real pairs of texts that every machine has: docstrings and the code that they describe, from installed packages.

What: `docstrings:` pairs the first paragraph of a function's docstring with the function less its docstring;
`modules:` pairs the docstring of a file with the rest of the file, which makes long documents. Behind the colon come
packages (`docstrings:torch,scipy`), all but some (`docstrings:-torch`), or nothing for all. Packages are found, not
imported. Price: on one core, some 10 seconds for 1,000 files.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pkgutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ..data.files import irregular


FUNCTIONS, MODULES = "docstrings:", "modules:"
FILES_PER_PACKAGE = 300  # spread over the package, so that one with thousands does not fill the data
SHORTEST_DOCSTRING, LONGEST_FILE = 30, 400_000  # characters
FEWEST_LINES = 3


def packages_of(words: str) -> list[str]:
    """The packages that are meant by what stands behind the colon.

    Raises:
        ValueError: a package that is not installed.
    """
    folders = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    installed = sorted(module.name for module in pkgutil.iter_modules(list(folders)) if module.ispkg)
    if not words:
        return installed
    named = words.removeprefix("-").split(",")
    for name in named:
        if name not in installed:
            raise ValueError(f"`{name}` in `{words}` is no installed package: install it, or leave it out.")
    return [name for name in installed if name not in named] if words.startswith("-") else named


def files_of(package: str) -> list[Path]:
    """At most `FILES_PER_PACKAGE` sources of an installed package, evenly spread, without its tests."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(list(spec.submodule_search_locations)[0])
    files = [file for file in sorted(folder.rglob("*.py")) if "tests" not in file.parts and not irregular(file)]
    return files[:: -(-len(files) // FILES_PER_PACKAGE) or 1]


def mine_functions(words: str) -> Iterator[dict[str, str]]:
    """Pairs of `anchor`, the first paragraph of a docstring, and `positive`, its function; each text once."""
    seen: set[str] = set()
    for _, lines, tree in _parsed(words):
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            anchor, code = _first_paragraph(node), _without_docstring(node, lines)
            if anchor is None or len(code) < FEWEST_LINES:
                continue
            positive = inspect.cleandoc("\n" + "\n".join(code))
            if anchor not in seen and positive not in seen:
                seen |= {anchor, positive}
                yield {"anchor": anchor, "positive": positive}


def mine_modules(words: str) -> Iterator[dict[str, str]]:
    """Pairs of `anchor`, the first paragraph of a file's docstring, and `positive`, the rest of the file."""
    seen: set[str] = set()
    for _, lines, tree in _parsed(words):
        anchor = _first_paragraph(tree)
        if anchor is None or anchor in seen or len(tree.body) < 2:
            continue
        docstring = tree.body[0]
        seen.add(anchor)
        yield {"anchor": anchor, "positive": "\n".join(lines[docstring.end_lineno :]).strip()}


def _parsed(words: str) -> Iterator[tuple[Path, list[str], ast.Module]]:
    for package in packages_of(words):
        for file in files_of(package):
            if file.stat().st_size > LONGEST_FILE:
                continue
            try:
                source = file.read_text(encoding="utf-8")
                yield file, source.split("\n"), ast.parse(source)
            except (SyntaxError, ValueError):  # a template, or not for this Python
                continue


def _first_paragraph(node) -> str | None:
    docstring = ast.get_docstring(node)
    if docstring is None:
        return None
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph if len(paragraph) >= SHORTEST_DOCSTRING else None


def _without_docstring(node, lines: list[str]) -> list[str]:
    """The lines of a function, empty if its docstring is all that it has or shares a line with code."""
    docstring, *body = node.body
    if not body or body[0].lineno == docstring.end_lineno or docstring.lineno == node.lineno:
        return []
    return lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]

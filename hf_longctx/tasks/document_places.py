"""Where a recipe's documents and models may be, by names that keep machine paths out of YAML files.

The model `package:NAME` is the folder of an installed Python package (found, not imported), the data set `stdlib:` is
the long files among the Python standard library's own sources, and `stdlib_functions:` is the functions in all of
them: signature and docstring as prompts, bodies as completions.
"""

from __future__ import annotations

import ast
import glob
import importlib.util
import os
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..data.documents import load_documents
from ..data.files import irregular


PACKAGE, STDLIB, STDLIB_FUNCTIONS = "package:", "stdlib:", "stdlib_functions:"
BUILT_IN_DATASETS = {
    STDLIB: "the long sources of Python's standard library",
    STDLIB_FUNCTIONS: "the functions of Python's standard library",
}
LONG_SOURCE = 80_000  # characters; about 18,000 tokens


def model_folder(name: str | None) -> str:
    """A hub name or folder as it is; `package:NAME` as the folder of that installed package."""
    if not name:
        raise ValueError("`model_name_or_path` is missing: give a model on the Hub, a folder, or `package:NAME`.")
    if not name.startswith(PACKAGE):
        return name
    package = name[len(PACKAGE) :]
    try:
        spec = importlib.util.find_spec(package)
    except (ValueError, ImportError):  # no name at all, or a part of a package that is not here
        spec = None
    if spec is None or not spec.submodule_search_locations:
        remedy = f"run `pip install {package.partition('.')[0].replace('_', '-')}`." if package else "name one."
        raise ValueError(f"`{name}` names no installed package: {remedy}")
    return spec.submodule_search_locations[0]


def open_documents(place: str, *, text_field: str | None = "text", **options: Any) -> Any:
    """Documents of a place: one of the names above, or what [`load_documents`] reads.

    Args:
        place (`str`): where they are.
        text_field (`str`, *optional*, defaults to `"text"`), options: those of [`load_documents`].
    """
    if place == STDLIB:
        return load_documents(_stdlib_pattern()).filter(lambda row: len(row["text"]) >= LONG_SOURCE)
    if place == STDLIB_FUNCTIONS:
        from datasets import Dataset

        return Dataset.from_list(list(read_functions(sorted(glob.glob(_stdlib_pattern())))))
    found = model_folder(place) if place.startswith(PACKAGE) else place
    return load_documents(found, text_field=text_field, **options)


def _stdlib_pattern() -> str:
    return os.path.join(glob.escape(sysconfig.get_paths()["stdlib"]), "*.py")


def read_functions(files: Iterable[str]) -> Iterator[dict[str, str]]:
    """Every function and method that has a docstring and a body, less the indentation that its lines share.

    The prompt ends with the docstring and the completion begins with the line break after it, because tokenizers merge
    a line break with the indentation behind it: a prompt that ended with one would end inside a token.
    """
    for file in files:
        if irregular(file) is not None:
            continue
        source = Path(file).read_text(encoding="utf-8")
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or ast.get_docstring(node) is None:
                continue
            docstring, *body = node.body
            if not body or docstring.end_lineno is None or body[0].lineno == docstring.end_lineno:
                continue
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
            end = docstring.end_lineno - node.lineno + 1
            yield {"prompt": "\n".join(text[:end]).rstrip(), "completion": "\n" + "\n".join(text[end:])}

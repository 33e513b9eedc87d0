"""Records which `raise` of the package was executed in which test, for `docs/refusals.py`.

While `HF_LONGCTX_RAISES` names a folder, an import hook compiles the package's modules with every `raise X` written as
`raise seen(X)`. Nothing else runs differently, and a test that raises nothing pays nothing. Ranks that are forked from
`tests.preload` record too; a program that a test starts does if it calls [`install`] first. Price: modules are
compiled anew in every process, about a second.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path


FOLDER = "HF_LONGCTX_RAISES"
PACKAGE = "hf_longctx"
_SEEN = "__seen_by_tests__"


def install(package: str = PACKAGE) -> Finder | None:
    """Record from now on, in modules of `package` that are not yet imported, if the environment asks for it."""
    if not os.environ.get(FOLDER):
        return None
    finder = Finder(package)
    sys.meta_path.insert(0, finder)
    return finder


def begin_worker(name: str) -> None:
    """A folder of its own for this process and those that it starts: a worker runs one test at a time."""
    if os.environ.get(FOLDER):
        folder = Path(os.environ[FOLDER], name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[FOLDER] = str(folder)


def begin_test(name: str) -> None:
    """What this process and those that it started record belongs to the test `name` from here on."""
    if os.environ.get(FOLDER):
        with open(Path(os.environ[FOLDER], "ran"), "a", encoding="utf-8") as file:
            file.write(name + "\n")


def write_record(module: str, function: str, line: int, error: BaseException) -> None:
    """One line of JSON: where, in which test, and what it says."""
    folder = Path(os.environ[FOLDER])
    message = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    with contextlib.suppress(OSError):  # before the first test
        test = (folder / "ran").read_text(encoding="utf-8").splitlines()[-1]
        # A file a test: one of them limits how long a file may grow, which earlier records must not have used up.
        with open(folder / f"{os.getpid()}_{zlib.crc32(test.encode())}.jsonl", "a", encoding="utf-8") as file:
            where = {"module": module, "function": function, "line": line}
            file.write(json.dumps({**where, "test": test, "message": message}) + "\n")


class Finder:
    """Finds modules of one package as everybody does, and gives them the loader below."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] != self.package:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str):
        """Compiled from the source, and kept nowhere: the bytecode on disk is that of the source as it stands."""
        tree = _Rewrite().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module) -> None:
        root = Path(sys.modules[module.__name__.split(".")[0]].__file__).parent
        setattr(module, _SEEN, _recorder(Path(self.path).relative_to(root).as_posix()))
        super().exec_module(module)


class _Rewrite(ast.NodeTransformer):
    def __init__(self) -> None:
        self.inside: list[str] = []

    def visit(self, node: ast.AST) -> ast.AST:
        """As the name of a function stands in `docs/sentences.py`: with those of the classes and functions around."""
        is_named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        self.inside += [node.name] if is_named else []
        node = super().visit(node)
        if is_named:
            self.inside.pop()
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        self.generic_visit(node)
        if node.exc is not None:
            where = [ast.Constant(".".join(self.inside)), ast.Constant(node.lineno)]
            node.exc = ast.copy_location(ast.Call(ast.Name(_SEEN, ast.Load()), [node.exc, *where], []), node.exc)
        return node


def _recorder(module: str) -> Callable:
    def seen(error, function: str, line: int):
        if isinstance(error, BaseException):  # a class says nothing
            write_record(module, function, line, error)
        return error

    return seen

"""Read the messages of all refusals from the code of the package; nothing is imported.

A message is the text of a `raise SomeError("...")`, with `{name}` for what it fills in. `refusals.py` makes a
page of them.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
ERRORS = {"ValueError", "NotImplementedError", "ImportError", "RuntimeError", "TypeError", "AttributeError"}
# Raised by the check that a user calls on purpose, or that a trainer runs on its first packed batch.
CHECKS = {"attention/contamination.py"}
# Functions that only run after the first step has begun. What any other raises comes before it.
LATER = {"backward", "remove", "write_checkpoint", "_refuse_step"}
# No message of its own: it passes on the message of another error, or keeps a protocol of Python.
PASSED_ON = {
    ("attention/deferred.py", "__getattr__"),
    ("proof/ranks.py", "_collect"),
    ("resilience/checkpoints.py", "_refuse_everywhere"),
    ("tasks/embed_files.py", "_rows_of_lines"),
}
# Never an error to a user: the package itself catches it and makes a result of it.
CAUGHT = {"Outcome"}
# Never an error to a user: a caller logs it and continues.
LOGGED = {("reporting/planned_memory.py", "_plan")}
HOLE = "\0"  # where a message is filled in


@dataclass(frozen=True)
class Refusal:
    """One message: `shown` as a reader sees it, `holed` with holes for what is filled in, raised in line `line`.

    `is_made`: `function` returns the error, and another of its file raises it.
    """

    module: str
    function: str
    error: str
    line: int
    shown: str
    holed: str
    is_made: bool = False

    @property
    def is_early(self) -> bool:
        return self.function.rpartition(".")[2] not in LATER


def find_refusals(package: Path = ROOT / "hf_longctx") -> list[Refusal]:
    """Every message in the order of modules and lines."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    own = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(getattr(b, "id", "") in ERRORS | {"Exception"} for b in node.bases)
        if not node.name.startswith("_") and node.name not in CAUGHT  # with `_`: caught in its own module
    }
    found = []
    for path, tree in trees.items():
        module = path.relative_to(package).as_posix()
        for function, node in _raises(tree, ""):
            error = node.exc if isinstance(node, ast.Raise) else node.value
            name = getattr(error.func, "id", getattr(error.func, "attr", ""))
            known = name in ERRORS | own or (name == "AssertionError" and module in CHECKS)
            if not known or not error.args or (module, function.rpartition(".")[2]) in PASSED_ON | LOGGED:
                continue
            for parts in _texts(error.args[0], tree, trees.values()):
                place = module, function, name, node.lineno
                found.append(Refusal(*place, _shown(parts), _holed(parts), isinstance(node, ast.Return)))
    return found


def _raises(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.Raise | ast.Return]]:
    """Where an error is raised, or returned to be raised, with the name of the function around it."""
    for child in ast.iter_child_nodes(node):
        name = inside
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{inside}.{child.name}" if inside else child.name
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            yield inside, child
        if isinstance(child, ast.Return) and isinstance(child.value, ast.Call):
            yield inside, child
        yield from _raises(child, name)


def _texts(node: ast.expr, tree: ast.Module, package: Collection[ast.Module]) -> list[list[str | ast.expr]]:
    """The texts that an expression can be: constants and the expressions between them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [[node.value]]
    if isinstance(node, ast.JoinedStr):
        return [[_constant(part.value, (tree, *package)) for part in node.values]]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _texts(node.left, tree, package) for b in _texts(node.right, tree, package)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, tree, package) + _texts(node.orelse, tree, package)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        # A function of the same file that writes the message, or of another one.
        for home in (tree, *package):
            for maker in ast.walk(home):
                if isinstance(maker, ast.FunctionDef) and maker.name == node.func.id:
                    returns = [n.value for n in ast.walk(maker) if isinstance(n, ast.Return) and n.value is not None]
                    return [text for value in returns for text in _texts(value, home, package)]
    if isinstance(node, ast.Name):
        values = [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Assign) and any(getattr(target, "id", None) == node.id for target in n.targets)
        ]
        texts = [text for value in values if not isinstance(value, ast.Name) for text in _texts(value, tree, package)]
        if any(isinstance(part, str) for text in texts for part in text):
            return texts
    return [[node]]


def _constant(value: str | ast.expr, homes: Collection[ast.Module]) -> str | ast.expr:
    """The text of a constant of the package, which is filled in for every reader alike, or `value` itself."""
    if not isinstance(value, ast.Name) or not value.id.isupper():
        return value
    assigned = (
        node.value.value
        for home in homes
        for node in home.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if any(getattr(target, "id", None) == value.id for target in node.targets)
    )
    return next((text for text in assigned if isinstance(text, str)), value)


def _shown(parts: list[str | ast.expr]) -> str:
    return "".join(part if isinstance(part, str) else "{" + _name(part).strip("_") + "}" for part in parts)


def _holed(parts: list[str | ast.expr]) -> str:
    return "".join(part if isinstance(part, str) else HOLE for part in parts)


def _name(node: ast.expr) -> str:
    """A short name of what is filled in."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr if node.attr != "__name__" else _name(node.value)
    if isinstance(node, ast.Call):
        named = [a for a in node.args if not isinstance(a, ast.Constant)]
        return _name(named[0] if named else node.func)
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return _name(node.value)
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return _name(node.generators[0].iter)
    if isinstance(node, ast.IfExp):
        return _name(node.body) if not isinstance(node.body, ast.Constant) else "..."
    if isinstance(node, ast.BinOp):
        return _name(node.left) if isinstance(node.right, ast.Constant) else _name(node.right)
    return "..."

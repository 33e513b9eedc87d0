"""The rooms of the package: imports point down an ordered list, names are exported by their room, and no two modules
share a name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

import hf_longctx


ROOT = Path(hf_longctx.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")

# From the lowest to the highest. A room may import the rooms before it, and itself.
ROOMS = (
    "on_import",
    "class_tables",
    "lazy_exports",
    "tested_versions",
    "config",
    "tested_versions",
    "families",
    "tiny_check",
    "parallel",
    "attention",
    "losses",
    "data",
    "adapters",
    "planner",
    "reporting",
    "resilience",
    "ttt",
    "sleep",
    "trainer",
    "embedding",
    "proof",
    "tasks",
    "launch",
    "startup",
    "cli",
    "__main__",
)
# The lowest room that may import a library.
LOWEST = {
    "torch": "tiny_check",
    "transformers": "attention",
    "datasets": "data",
    "accelerate": "reporting",
    "peft": "resilience",
    "trl": "trainer",
    "sentence_transformers": "embedding",
}
LOWEST_WITH_A_TRAINER = "reporting"  # of transformers


def room_of(module: str) -> int:
    """The place in `ROOMS` of a dotted module of the package. A new room must be put there."""
    room = module.split(".")[1]
    assert room in ROOMS, f"`{module}` is in no room: add '{room}' to ROOMS"
    return ROOMS.index(room)


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Every absolute dotted name that `source` imports, at any depth of the code."""
    found = set()
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def upward_arrows(source: str, module: str, is_package: bool = False) -> list[str]:
    room, arrows = room_of(module), []
    for target in sorted(imports_of(source, module, is_package)):
        top, *rest = target.split(".")
        if top == "hf_longctx":
            # `from .. import config` names a room, `from .. import LongContextTrainer` the root, which is above all.
            is_room = bool(rest) and rest[0] in ROOMS
            too_high = rest != ["__version__"] and (not is_room or room_of(target) > room)
        else:
            names_trainer = any("trainer" in part.lower() or "Training" in part for part in rest)
            lowest = LOWEST_WITH_A_TRAINER if top == "transformers" and names_trainer else LOWEST.get(top)
            too_high = lowest is not None and room < ROOMS.index(lowest)
        if too_high:
            arrows.append(f"{module} imports {target}")
    return arrows


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_arrows_point_down(path):
    assert upward_arrows(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hf_longctx.config.run", "import torch"),
        ("hf_longctx.config.run", "from ..parallel import mesh"),
        ("hf_longctx.parallel.mesh", "from ..attention.masks import read_rule"),
        ("hf_longctx.parallel.mesh", "def f():\n    from ..trainer import mixin"),
        ("hf_longctx.parallel.mesh", "from transformers import PreTrainedModel"),
        ("hf_longctx.attention.masks", "from hf_longctx.trainer.mixin import SequenceParallelMixin"),
        ("hf_longctx.attention.masks", "from .. import LongContextTrainer"),
        ("hf_longctx.attention.masks", "from transformers import Trainer"),
        ("hf_longctx.data.packing.collator", "from transformers.trainer_utils import seed_worker"),
        ("hf_longctx.data.shard_collator", "from transformers import TrainingArguments"),
        ("hf_longctx.losses.dft", "import trl.trainer"),
        ("hf_longctx.reporting.meter", "from ..trainer.checks import check_model"),
        ("hf_longctx.resilience.checkpoints", "from ..trainer.loaders import build_loader"),
        ("hf_longctx.trainer.mixin", "from ..embedding.spans import encode_spans"),
        ("hf_longctx.embedding.trainer", "from ..proof.verification import verify"),
    ],
)
def test_arrow_checker_sees_an_upward_import(module, source):
    assert len(upward_arrows(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hf_longctx.config.run", "from dataclasses import dataclass"),
        (
            "hf_longctx.parallel.mesh",
            "import torch\nfrom ..config.run import x\nfrom .. import config",
        ),
        ("hf_longctx.attention.masks", "from transformers import masking_utils\nfrom ..parallel.shard import x"),
        ("hf_longctx.trainer.mixin", "import trl\nfrom transformers import Trainer\nfrom .. import __version__"),
        ("hf_longctx.proof.compare", "from ..trainer.checks import x\nimport sentence_transformers"),
    ],
)
def test_arrow_checker_allows_a_downward_import(module, source):
    assert upward_arrows(source, module) == []


def test_no_two_modules_share_a_name():
    """A commands' file is called like the command, and a task's like the recipe."""
    names = Counter(
        path.stem
        for path in FILES
        if path.name != "__init__.py" and path.relative_to(ROOT).parts[0] not in ("cli", "tasks")
    )
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_the_tree_of_the_docs_names_every_module_once():
    page = (ROOT.parent / "docs" / "README.md").read_text(encoding="utf-8")
    tree = page.partition("\n## The tree\n")[2].split("\n```\n")[1]
    tree = tree[tree.index("hf_longctx/\n") : tree.index("\nrecipes/\n")]
    folders, named = ["hf_longctx"], []
    for line in tree.splitlines()[1:]:
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name.rstrip("/")]
        if name.endswith(".py"):
            named.append("/".join(folders))
    modules = [path.relative_to(ROOT.parent).as_posix() for path in FILES if path.name != "__init__.py"]
    assert sorted(named) == sorted(["hf_longctx/__init__.py", *modules])


# What a room exports

PACKAGES = [ROOT, *(path.parent for path in FILES if path.name == "__init__.py")]


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: module_name(folder / "__init__.py"))
def test_room_exports_what_type_checkers_see_and_hides_no_module(folder):
    room = importlib.import_module(module_name(folder / "__init__.py"))
    seen = {
        alias.name: statement.module
        for node in ast.parse((folder / "__init__.py").read_text()).body
        if isinstance(node, ast.If)
        for statement in node.body
        for alias in statement.names
    }
    exports = getattr(room, "_EXPORTS", {})
    assert seen == {name: module for module, names in exports.items() for name in names}
    assert getattr(room, "__all__", []) == sorted(seen)
    assert not set(seen) & {path.stem for path in folder.iterdir()}


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: module_name(folder / "__init__.py"))
def test_exported_name_is_public_and_documented(folder):
    room = importlib.import_module(module_name(folder / "__init__.py"))
    for name in getattr(room, "__all__", []):
        if room.__name__.endswith(".embedding") or name == "EmbeddingReport":
            pytest.importorskip("sentence_transformers")
        if name == "LongContextSFTTrainer":
            pytest.importorskip("trl")
        assert getattr(room, name).__doc__ or isinstance(getattr(room, name), dict)


def test_unknown_name_of_a_room_lists_what_there_is():
    with pytest.raises(AttributeError, match="module 'hf_longctx.adapters' has no attribute 'tile'.*tile_loss"):
        hf_longctx.adapters.tile  # noqa: B018

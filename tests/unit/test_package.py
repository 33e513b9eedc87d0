"""The package as a whole: what importing it costs and does, its public names, and the budgets of every file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_longctx
from hf_longctx.on_import import call_after_import


ROOT = Path(hf_longctx.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.py"))
HEAVY = ("trl", "sentence_transformers", "datasets")


def in_subprocess(code: str):
    """Run `code` in a fresh interpreter and return what its last line prints, as JSON."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# What an import costs


def test_import_adds_under_300_milliseconds_to_transformers():
    code = """
import json, time
import transformers
start = time.perf_counter()
import hf_longctx
print(json.dumps(time.perf_counter() - start))
"""
    assert min(in_subprocess(code) for _ in range(3)) < 0.3


def test_import_alone_pulls_in_neither_torch_nor_transformers_nor_any_trainer():
    code = "import sys, json, hf_longctx; print(json.dumps(sorted(sys.modules)))"
    assert not set(in_subprocess(code)) & {"torch", "transformers", *HEAVY}


REGISTERED = """
import json, sys
def state():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attentions
    ours = [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_longctx")]
    hooks = sorted({finder.module_name.split("modeling_")[1] for finder in ours})
    return ["ulysses" in attentions.valid_keys(), "ulysses" in masks.valid_keys(), hooks]

import hf_longctx
ours = [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_longctx")]
waiting = sorted({finder.module_name.split("modeling_")[1] for finder in ours})
import hf_longctx.attention.explain  # itself imports modeling_utils, while it is only half loaded
before_transformers = state()
pulled = [name for name in ("trl", "sentence_transformers") if name in sys.modules]

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
AttentionInterface._global_mapping.pop("ulysses")
AttentionMaskInterface._global_mapping.pop("ulysses")
for name in [name for name in sys.modules if name.startswith("hf_longctx")]:
    del sys.modules[name]
gone = state()[:2]
import hf_longctx
print(json.dumps([waiting, before_transformers, pulled, gone, state()]))
"""


def test_name_is_registered_in_both_registries_in_either_import_order_and_the_hook_leaves():
    waiting, before_transformers, pulled, gone, after_transformers = in_subprocess(REGISTERED)
    assert waiting == ["falcon", "gpt_neo", "utils"]
    tables = ["falcon", "gpt_neo"]  # of attention classes, which get the names once they are imported
    assert before_transformers == [True, True, tables]
    assert pulled == []
    assert gone == [False, False]
    assert after_transformers == [True, True, tables]


def test_tables_of_attention_classes_know_the_names_and_the_hooks_leave():
    code = """
import json, sys
import hf_longctx
import transformers
from transformers.models.gpt_neo import modeling_gpt_neo as gpt_neo
from transformers.models.falcon import modeling_falcon as falcon
tables = gpt_neo.GPT_NEO_ATTENTION_CLASSES, falcon.FALCON_ATTENTION_CLASSES
hooks = [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_longctx")]
print(json.dumps([[table.get(name, int) is table["eager"] for name in ("ulysses", "packed")] for table in tables]
    + [len(hooks)]))
"""
    assert in_subprocess(code) == [[True, True], [True, True], 0]


# The hook itself, on modules of our own


@pytest.fixture
def new_module(tmp_path, monkeypatch):
    """A function that writes an importable module; module and hooks are removed afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    names = []

    def write(name: str, source: str = "value = 1\n") -> str:
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_hook_calls_once_after_the_import_and_leaves(new_module):
    name, calls, finders = new_module("waited_for"), [], list(sys.meta_path)
    call_after_import(name, lambda: calls.append(sys.modules[name].value))
    importlib.import_module(new_module("another_module"))
    assert calls == [] and len(sys.meta_path) == len(finders) + 1
    importlib.import_module(name)
    importlib.import_module(name)
    assert calls == [1]
    assert sys.meta_path == finders


def test_hook_calls_at_once_if_the_module_is_there(new_module):
    name, calls, finders = new_module("already_there"), [], list(sys.meta_path)
    importlib.import_module(name)
    call_after_import(name, lambda: calls.append(1))
    assert calls == [1] and sys.meta_path == finders


def test_hook_keeps_the_error_of_a_module_that_fails(new_module):
    name, calls = new_module("broken_module", "raise KeyError('its own error')\n"), []
    call_after_import(name, lambda: calls.append(1))
    with pytest.raises(KeyError, match="its own error"):
        importlib.import_module(name)
    assert calls == []


def test_hook_survives_a_caller_that_only_looks_for_the_module(new_module):
    name, calls = new_module("looked_for"), []
    call_after_import(name, lambda: calls.append(1))
    assert importlib.util.find_spec(name) is not None
    assert calls == []
    importlib.import_module(name)
    assert calls == [1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Public names


def test_public_names_are_sorted():
    assert hf_longctx.__all__
    assert hf_longctx.__all__ == sorted(set(hf_longctx.__all__))
    assert set(hf_longctx.__all__) <= set(dir(hf_longctx))
    assert "__version__" in dir(hf_longctx)


@pytest.mark.parametrize("name", hf_longctx.__all__)
def test_public_name_loads(name):
    if name == "LongContextSFTTrainer":
        pytest.importorskip("trl")
    if name == "TiledMultipleNegativesRankingLoss":
        pytest.importorskip("sentence_transformers")
    value = getattr(hf_longctx, name)
    assert value.__name__ == name
    assert name in hf_longctx._EXPORTS[value.__module__.removeprefix("hf_longctx.")]
    assert value.__doc__


def test_unknown_name_lists_what_there_is():
    with pytest.raises(AttributeError) as error:
        hf_longctx.LongContextTrainr  # noqa: B018
    assert "LongContextTrainr" in str(error.value)
    assert all(name in str(error.value) for name in hf_longctx.__all__)


def names_in(source: str) -> set[str]:
    """Every imported name and every attribute that `source` uses."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("names", "only"),
    [
        ({"AttentionInterface", "AttentionMaskInterface"}, "attention/registry.py"),
        ({"new_group", "new_subgroups", "new_subgroups_by_enumeration", "init_device_mesh"}, "parallel/mesh.py"),
    ],
)
def test_registries_and_process_groups_are_touched_in_one_file(names, only):
    users = [str(path.relative_to(ROOT)) for path in FILES if names & names_in(path.read_text())]
    assert users == [only]


# Budgets


def docstring_of(node: ast.AST) -> range:
    """The lines of a docstring, empty if there is none."""
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return range(first.lineno, first.end_lineno + 1)
    return range(0)


def function_lengths(source: str) -> dict[str, int]:
    """Lines of every function without its docstring."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {n.name: n.end_lineno - n.lineno + 1 - len(docstring_of(n)) for n in functions}


def lines_of_code(source: str) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = {i for n in ast.walk(ast.parse(source)) if isinstance(n, documented) for i in docstring_of(n)}
    lines = enumerate(source.splitlines(), start=1)
    return sum(1 for i, line in lines if i not in skipped and line.strip() and not line.strip().startswith("#"))


@pytest.mark.parametrize("path", [*FILES, *RECIPES], ids=module_name)
def test_file_keeps_its_budget_and_says_what_it_is_for(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    assert {name: length for name, length in function_lengths(source).items() if length > 60} == {}
    assert ast.get_docstring(ast.parse(source))


def test_mixin_keeps_its_budget():
    assert lines_of_code((ROOT / "trainer" / "mixin.py").read_text()) <= 150


def test_counters_count():
    source = '"""File.\n\nMore.\n"""\n\n# why\ndef f(x):\n    """One\n    two."""\n    # why\n    return x\n'
    assert lines_of_code(source) == 2
    assert function_lengths(source) == {"f": 3}


LACKING = """
import sys
from tests import raises
raises.install()
sys.modules["sentence_transformers"] = sys.modules["trl"] = None
import hf_longctx
for name in sys.argv[1:]:
    try:
        getattr(hf_longctx, name)
    except ImportError as error:
        print(error)
"""


def test_missing_host_is_told_with_the_extra():
    names = ("pack_embeddings", "SpanRankingLoss", "LongContextSentenceTransformerTrainer")
    trl = ("LongContextSFTTrainer", "LongContextDPOTrainer", "LongContextRewardTrainer")
    names = (*names, "TiledMultipleNegativesRankingLoss", *trl)
    command = [sys.executable, "-c", LACKING, *names]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent).stdout
    assert "`pack_embeddings` needs sentence-transformers: `pip install hf-longctx[embedding]`" in printed
    assert "`SpanRankingLoss` needs sentence-transformers: `pip install hf-longctx[embedding]`" in printed
    assert "`LongContextSentenceTransformerTrainer` needs sentence-transformers: `pip install hf-lon" in printed
    assert "`TiledMultipleNegativesRankingLoss` needs sentence-transformers: `pip install hf-longctx" in printed
    assert all(f"`{name}` needs trl: `pip install hf-longctx[trl]`" in printed for name in trl)


LACKING_IN_A_RECIPE = """
import importlib, sys
from tests import raises
raises.install()
sys.modules[sys.argv[1]] = None
for name in sys.argv[2:]:
    try:
        importlib.import_module("hf_longctx.tasks." + name)
    except ImportError as error:
        print(name, error, sep=": ")
"""


@pytest.mark.parametrize(
    ("library", "told"),
    [
        (
            "trl",
            {
                "embed": "embedding",
                **dict.fromkeys(("sft", "pretrain", "dpo", "reward", "kto", "ttt", "inputs"), "trl"),
            },
        ),
        ("datasets", {"sft": "trl", "pretrain": "trl", "embed": "embedding", "embed_sources": "embedding"}),
        ("sentence_transformers", {"embed": "embedding", "embed_model": "embedding"}),
    ],
)
def test_missing_library_of_a_recipe_is_told_with_the_extra(library, told):
    command = [sys.executable, "-c", LACKING_IN_A_RECIPE, library, *told]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent).stdout.splitlines()
    assert [line.partition(": ")[0] for line in printed] == list(told)
    for line, extra in zip(printed, told.values()):
        assert library.replace("_", "-") in line.partition(": ")[2]
        assert line.endswith(f"`pip install hf-longctx[{extra}]`.")

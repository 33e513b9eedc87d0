"""The tested versions: one file that pip takes as constraints, the wheel carries and `hf-longctx env` reads."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hf_longctx.cli.env import PACKAGES
from hf_longctx.tested_versions import read_tested_versions


ROOT = Path(__file__).parents[2]
FILE = ROOT / "hf_longctx" / "tested_versions.txt"
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
# All requirements but those of the pages.
REQUIREMENTS = [Requirement(text) for text in re.findall(r'"((?!mkdocs|latex2mathml)[\w-]+>=[\w.]+)"', SETUP)]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def write():
    """The function by which `make constraints` writes the file."""
    return load("write_tested_versions").constraints


FROZEN = """\
# Editable install with no version control (hf-longctx==0.1.0)
-e /home/me/hf_longctx
huggingface_hub==2.4.0
Jinja2==3.1.6
accelerate==1.15.0
cuda-bindings==13.5.0
local @ file:///home/me/local
nvidia-cublas==13.1.1.3
setuptools==84.2.1
torch==2.13.0+cu130
triton==3.7.1
"""


def test_the_writer_pins_libraries_caps_torch_and_leaves_out_what_a_machine_has_of_its_own(write):
    lines = [line for line in write(FROZEN).splitlines() if not line.startswith("#")]
    assert lines == ["accelerate==1.15.0", "huggingface_hub==2.4.0", "Jinja2==3.1.6", "torch<=2.13.0"]


def test_the_file_is_as_the_writer_writes_it(write):
    text = FILE.read_text(encoding="utf-8")
    assert write(text.replace("torch<=", "torch==")) == text


def test_every_library_that_the_tests_install_has_a_tested_version_that_setup_allows():
    tested = read_tested_versions()
    names = {requirement.name for requirement in REQUIREMENTS}
    assert {"torch", "transformers", "trl", "sentence-transformers", "pytest", "ruff"} <= names
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(tested[requirement.name]), requirement


def test_env_knows_the_tested_version_of_every_library_but_kernels():
    assert set(PACKAGES) - set(read_tested_versions()) == {"kernels", "flash-attn"}


def test_the_wheel_carries_the_file():
    call = next(
        node for node in ast.walk(ast.parse(SETUP)) if getattr(getattr(node, "func", None), "id", "") == "setup"
    )
    data = next(keyword.value for keyword in call.keywords if keyword.arg == "package_data")
    assert FILE.name in ast.literal_eval(data)["hf_longctx"]


def test_the_floor_is_what_setup_allows_at_least():
    """The Makefile drops the lines of these names from the file and installs these versions."""
    line = re.search(r"^FLOOR +:= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE).group(1)
    pins = dict(pin.split("==") for pin in line.split())
    floors = {r.name: next(iter(r.specifier)).version for r in REQUIREMENTS}
    for name in ("transformers", "accelerate"):
        assert re.fullmatch(re.escape(floors[name]) + r"(\.0)*", pins[name])
    file = FILE.read_text(encoding="utf-8").splitlines()
    assert all(any(text.startswith(f"{name}==") for text in file) for name in pins)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({}, []),
        ({"tqdm": "99.0"}, []),
        ({"transformers": "99.0"}, ["transformers 99.0"]),
        ({"torch": "99.0+cpu"}, ["torch 99.0"]),
        ({"trl": None}, ["trl None"]),
    ],
)
def test_the_newest_libraries_run_all_tests_unless_they_are_the_tested_ones(changes, other):
    module, tested = load("choose_tests"), FILE.read_text(encoding="utf-8")
    installed = {**read_tested_versions(), **changes}
    frozen = "\n".join(f"{name.replace('-', '_')}=={version}" for name, version in installed.items() if version)
    tests, found = module.choose(frozen, tested)
    assert found == other and tests == (module.EVERY if other else module.FEW)
    assert all((ROOT / path).exists() for path in (*module.EVERY, *module.FEW))
    assert set(module.LIBRARIES) <= set(read_tested_versions())

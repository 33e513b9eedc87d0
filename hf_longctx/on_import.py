"""Run a function once another module has been imported, without importing it.

Registering an attention name needs `transformers.modeling_utils`, and with it torch: seconds that a command line or a
configuration file does not want to pay. So the registration waits until somebody imports that module anyway.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


def call_after_import(module_name: str, function: Callable[[], None]) -> None:
    """Call `function` now if `module_name` is already imported, otherwise right after its first import."""
    module = sys.modules.get(module_name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        function()
    else:
        sys.meta_path.insert(0, _WaitingFinder(module_name, function))


class _WaitingFinder(importlib.abc.MetaPathFinder):
    """Sees one import, hands it to the ordinary finders, and leaves."""

    def __init__(self, module_name: str, function: Callable[[], None]) -> None:
        self.module_name, self.function = module_name, function

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module_name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallingLoader(spec.loader, self.function)
        return spec


class _CallingLoader(importlib.abc.Loader):
    """The ordinary loader, and then the function."""

    def __init__(self, loader: importlib.abc.Loader, function: Callable[[], None]) -> None:
        self.loader, self.function = loader, function

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.function()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

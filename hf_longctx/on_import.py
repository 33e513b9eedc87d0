"""Run a function once another module has been imported, without importing it.

Registering an attention name needs `transformers.modeling_utils`, and with it torch: seconds that a command line or a
configuration file does not want to pay. So the registration waits until that module is imported anyway.
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
    """Hands the import of one module to the ordinary finders, and leaves once the module has run."""

    def __init__(self, module_name: str, function: Callable[[], None]) -> None:
        self.module_name, self.function, self.searching = module_name, function, False

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module_name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _CallingLoader(spec.loader, self)
        return spec

    def leave(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self.function()


class _CallingLoader(importlib.abc.Loader):
    """The ordinary loader, and then the function."""

    def __init__(self, loader: importlib.abc.Loader, finder: _WaitingFinder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.finder.leave()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

"""Names that a package exports from its modules, imported when they are first used.

A package is imported by every module inside it, so its `__init__` must import nothing itself: that would cost time,
need optional libraries, and make imports between packages circular.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module


def lazy_exports(
    package: str, exports: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` for a package's `__init__`.

    Args:
        package (`str`): its `__name__`.
        exports (`Mapping`): from a module, relative to the package, to the names that are taken from it. No name may
            be that of a module of the package, which would hide it.
    """
    modules = {name: module for module, names in exports.items() for name in names}
    names = sorted(modules)

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(names)}")
        return getattr(import_module(f".{modules[name]}", package), name)

    return get, lambda: sorted({*vars(import_module(package)), *names}), names

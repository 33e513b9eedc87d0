"""Models that choose the class of their attention by its name, from a table that knows transformers' names only.

GPT Neo and Falcon raise `KeyError` for any other name while they are built. Every name of ours gets the class that
computes attention in plain code there; what an adapter then puts on its instances calls our function. A table is only
touched once its module is imported, whether that is before or after the names are registered.
"""

from __future__ import annotations

import functools
import sys

from .on_import import call_after_import


# By module: the name of the table, and the entry whose class ours get.
_TABLES = {
    "transformers.models.falcon.modeling_falcon": ("FALCON_ATTENTION_CLASSES", "eager"),
    "transformers.models.gpt_neo.modeling_gpt_neo": ("GPT_NEO_ATTENTION_CLASSES", "eager"),
}
_names: set[str] = set()


def wait_for_class_tables() -> None:
    """Put the names into each table when its module is imported; called once by `import hf_longctx`."""
    for module in _TABLES:
        call_after_import(module, functools.partial(_fill, module))


def add_to_class_tables(name: str) -> None:
    """Let models with a table of attention classes be built on an attention name."""
    _names.add(name)
    for module in _TABLES:
        _fill(module)


def remove_from_class_tables(name: str) -> None:
    """Undo [`add_to_class_tables`]."""
    _names.discard(name)
    for module, (table, _) in _TABLES.items():
        getattr(sys.modules.get(module), table, {}).pop(name, None)


def _fill(module: str) -> None:
    table, like = _TABLES[module]
    classes = getattr(sys.modules.get(module), table, {})  # nothing before it is imported, or without such a table
    for name in _names if like in classes else ():
        classes.setdefault(name, classes[like])

"""The attention names of the package, in the order in which messages recommend them."""

from __future__ import annotations

from .lsh_name import HASHED
from .packed import PACKED
from .registry import add_entry
from .ulysses import ULYSSES


ENTRIES = (ULYSSES, PACKED, HASHED)


def register_attention_names() -> None:
    """Register every attention name of the package. Idempotent; called once by `import hf_longctx`."""
    for entry in ENTRIES:
        add_entry(entry)

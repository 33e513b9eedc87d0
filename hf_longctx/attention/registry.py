"""The only file that touches transformers' attention registries.

A name is registered with its mask function, always: a name without one gets no mask at all, and padding is lost in
silence.
"""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .deferred import deferred_mask
from .packed import packed_attention
from .ulysses import ulysses_attention


ATTENTION_FUNCTIONS = {"ulysses": ulysses_attention, "packed": packed_attention}


def register_attention_names() -> None:
    """Register every attention name of the package. Idempotent; called once by `import hf_longctx`."""
    for name, function in ATTENTION_FUNCTIONS.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, deferred_mask)

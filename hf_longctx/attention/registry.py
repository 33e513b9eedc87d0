"""The only file that touches transformers' attention registries.

A name is registered with its mask function, always: a name without one gets no mask at all, and padding is lost in
silence.
"""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .masks import deferred_mask
from .ulysses import ulysses_attention


ATTENTION_NAMES = ("ulysses",)


def register_attention_names() -> None:
    """Register every attention name of the package. Idempotent; called once by `import hf_longctx`."""
    AttentionInterface.register("ulysses", ulysses_attention)
    AttentionMaskInterface.register("ulysses", deferred_mask)

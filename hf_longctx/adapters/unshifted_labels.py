"""Causal language models of the host whose own loss does not shift labels.

The decoders of its encoder-decoders compare the logits of a token with the label of the same token: whoever trains
one passes labels that are shifted already. One process does that, and so must many: their labels are cut as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PretrainedConfig

ALIGNED_TYPES = frozenset(
    {
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "pegasus",
        "plbart",
        "whisper",
    }
)


def aligns_labels(config: PretrainedConfig) -> bool:
    """Whether the loss of the causal language model of this configuration takes labels that are shifted already.

    A wrong answer does not stay unseen: the trainers compare the loss on a tiny batch before the first step.
    """
    return config.model_type in ALIGNED_TYPES

"""Masks of a sliding window over tokens that were read before and tokens that are read now."""

from __future__ import annotations

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sliding_window_causal_mask_function

from ..attention.call_documents import shard_of_rows
from ..attention.registry import find_attention


def window_mask(
    name: str, config: object, hidden_states: torch.Tensor, window: int, carried: int, *, skip: bool = True
) -> object:
    """The mask of attention `name` where `t` tokens come after `carried` ones and each sees `window` tokens.

    Args:
        name (`str`): of the attention, as transformers knows it.
        config: of the model whose layers get the mask.
        hidden_states (`torch.Tensor` of shape `(B, t, D)`): for sizes, precision and device.
        window (`int`): tokens that a token sees, itself among them.
        carried (`int`): keys before the first of the new tokens.
        skip (`bool`): whether a mask may be left out where the kernel needs none.
    """
    rows, tokens, _ = hidden_states.shape
    make = ALL_MASK_ATTENTION_FUNCTIONS[name] if name in ALL_MASK_ATTENTION_FUNCTIONS else None
    if make is None:
        return None
    return make(
        batch_size=rows,
        q_length=tokens,
        kv_length=carried + tokens,
        q_offset=carried,
        kv_offset=0,
        mask_function=sliding_window_causal_mask_function(window),
        attention_mask=None,
        local_size=window,
        allow_is_causal_skip=skip,
        dtype=hidden_states.dtype,
        device=hidden_states.device,
        config=config,
    )


def row_facts(name: str, hidden_states: torch.Tensor) -> dict[str, object]:
    """What attention of this package gets in addition, so that it cuts whole rows into windows and makes no mask."""
    if find_attention(name) is None:
        return {}
    rows, tokens, _ = hidden_states.shape
    return {"sequence_shard": shard_of_rows({}, rows, tokens, hidden_states.device)}

"""GPT Neo: scores in float32 and without a scale; every other layer sees a window."""

from __future__ import annotations

import torch

from .own_call import OwnCall


def gpt_neo(call: OwnCall) -> tuple[torch.Tensor, None]:
    """The forward of `GPTNeoSelfAttention`."""
    layer, hidden_states = call.module, call.given["hidden_states"]
    heads = (*hidden_states.shape[:2], layer.num_heads, layer.head_dim)
    query, key, value = (
        projection(hidden_states).view(heads).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    wide = torch.promote_types(value.dtype, torch.float32)
    output = call.attend(
        query.float().to(wide),
        key.float().to(wide),
        value.to(wide),
        scaling=1.0,
        dropout=layer.attn_dropout.p,
        window=layer.config.window_size if layer.attention_type == "local" else None,
    )
    return layer.resid_dropout(layer.out_proj(output.to(value.dtype))), None

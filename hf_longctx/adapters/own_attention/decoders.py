"""Decoders whose attention computes scores itself."""

from __future__ import annotations

import torch

from .own_call import OwnCall


def bart(call: OwnCall) -> tuple[torch.Tensor, None]:
    """XGLM, TrOCR and MVP: BART's attention before it used transformers' attention interface."""
    layer, hidden_states = call.module, call.given["hidden_states"]
    if call.given.get("attn_prompt") is not None:
        raise NotImplementedError(
            "MVP's `use_prompt` puts keys of no token in front of every row, which belong to no rank and to no "
            "document: load it with `use_prompt=False`, or set `sequence_parallel_size` to 1 without packed rows."
        )
    query, key, value = (
        project(hidden_states).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    return layer.out_proj(call.attend(query * layer.scaling, key, value, scaling=1.0, dropout=layer.dropout)), None


def openai_gpt(call: OwnCall) -> list[torch.Tensor]:
    """GPT: its model makes a mask of padding, and each layer the causal one."""
    layer = call.module
    heads = (part.unflatten(-1, (layer.n_head, -1)).transpose(1, 2) for part in _split(layer, call.given["x"]))
    scaling = None if layer.scale else 1.0
    output = call.attend(*heads, scaling=scaling, dropout=layer.attn_dropout.p, is_causal=True)
    return [layer.resid_dropout(layer.c_proj(output))]


def _split(layer: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return layer.c_attn(hidden_states).split(layer.split_size, dim=2)


def image_gpt(call: OwnCall) -> tuple[torch.Tensor, None]:
    """ImageGPT: GPT-2's attention."""
    layer = call.module
    query, key, value = (
        part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for part in _split(layer, call.given["hidden_states"])
    )
    scaling = value.shape[-1] ** -0.5 if layer.scale_attn_weights else 1.0
    if layer.scale_attn_by_inverse_layer_idx:
        scaling /= layer.layer_idx + 1
    wide = torch.promote_types(value.dtype, torch.float32) if layer.reorder_and_upcast_attn else value.dtype
    output = call.attend(
        query.to(wide), key.to(wide), value.to(wide), scaling=scaling, dropout=layer.attn_dropout.p, is_causal=True
    )
    return layer.resid_dropout(layer.c_proj(output.to(value.dtype))), None


def gpt_neox_japanese(call: OwnCall) -> tuple[torch.Tensor, None, torch.Tensor | None]:
    """GPT-NeoX-Japanese: part of a head is rotated; the last layer's bias is added by its block."""
    layer, size = call.module, call.module.rotary_ndims
    states = layer.query_key_value(call.given["hidden_states"])
    states = states.unflatten(-1, (layer.num_attention_heads, -1)).transpose(1, 2)
    query, key, value = states.split(layer.head_size, dim=-1)
    rotate = call.function("apply_rotary_pos_emb")
    turned = rotate(query[..., :size], key[..., :size], *call.given["position_embeddings"])
    query, key = (
        torch.cat([part, whole[..., size:]], dim=-1) for part, whole in zip(turned, (query, key), strict=True)
    )
    scaling = 1.0 / layer.norm_factor
    output = call.attend(query, key, value, scaling=scaling, dropout=layer.attention_dropout.p)
    return layer.dense(output), None, layer.dense_bias


def xlm(call: OwnCall) -> tuple[torch.Tensor]:
    """XLM and FlauBERT: causal or not, as the mask that their model makes says by its shape."""
    layer, is_causal = call.module, call.given["mask"].dim() == 3
    if is_causal:
        call = call.ignoring_padding()  # it is set to 0 between layers, and seen
    heads = (
        project(call.given["input"]).unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)
        for project in (layer.q_lin, layer.k_lin, layer.v_lin)
    )
    output = call.attend(*heads, dropout=layer.dropout, is_causal=is_causal, returns_cache=False)
    return (layer.out_lin(output),)

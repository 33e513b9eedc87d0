"""BLOOM, MPT and Falcon: slopes times distances in their scores, and a rotation in most Falcons.

Falcon's model adds the slopes to its mask before its layers, and under any name but sdpa they add them once more. So
its layers run here whenever it has slopes, and its mask stays what it is ([`hide_masks`]).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...attention.alibi import alibi_slopes, distance_table, key_table, mpt_slopes
from ...attention.registry import find_attention
from ..instance_forward import put_on
from ..rebind import RebindPatch
from .own_call import OwnCall


HIDDEN_MASK = "mask without slopes"


# A field of the configuration: "distance" (the default), or "key" for the numbers as transformers rounds them.
FORM = "alibi_form"


def bloom(call: OwnCall) -> tuple[torch.Tensor, None]:
    """The forward of `BloomAttention`."""
    layer, given = call.module, call.given
    heads = layer._reshape(layer.query_key_value(given["hidden_states"]))
    bias = numbers(call, alibi_slopes(layer.num_heads), heads[0].dtype)
    dropout = layer.attention_dropout.p
    output = call.attend(*heads, dropout=dropout, scaling=layer.inv_norm_factor, is_causal=True, **bias)
    dropped = call.function("dropout_add")(
        layer.dense(output), given["residual"], layer.hidden_dropout, layer.training
    )
    return dropped, None


def mpt(call: OwnCall) -> tuple[torch.Tensor, None]:
    """The forward of `MptAttention`."""
    layer, hidden_states = call.module, call.given["hidden_states"]
    mixed = layer.Wqkv(hidden_states)
    if layer.clip_qkv:
        mixed = mixed.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    heads = (part.unflatten(-1, (layer.n_heads, layer.head_dim)).transpose(1, 2) for part in mixed.chunk(3, dim=2))
    bias = numbers(call, mpt_slopes(layer.n_heads), mixed.dtype)
    output = call.attend(*heads, dropout=layer.attn_dropout_p, scaling=layer.softmax_scale, is_causal=True, **bias)
    return layer.out_proj(output), None


def falcon(call: OwnCall) -> tuple[torch.Tensor, None]:
    """The forward of `FalconAttention`, with ALiBi or a rotation."""
    layer, given = call.module, call.given
    split = layer._split_heads(layer.query_key_value(given["hidden_states"]))
    query, key, value = (heads.transpose(1, 2) for heads in split)
    if not layer.config.alibi:
        query, key = call.function("apply_rotary_pos_emb")(query, key, *given["position_embeddings"])
        return layer.dense(call.attend(query, key, value, is_causal=True)), None
    # transformers keeps the slopes in bfloat16, and scales them with the scores.
    slopes = alibi_slopes(layer.num_heads).bfloat16().float() * layer.inv_norm_factor
    bias = numbers(call, slopes, query.dtype)
    return layer.dense(call.attend(query, key, value, dropout=layer.attention_dropout.p, is_causal=True, **bias)), None


def numbers(call: OwnCall, slopes: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the layer adds to its scores, by the keyword of our attention functions."""
    tokens = call.shard.num_tokens
    slopes = slopes.to(call.given["hidden_states"].device)
    if getattr(call.rows.config, FORM, "distance") == "key":
        return {"key_bias": key_table(slopes, tokens, dtype)}
    return {"distance_bias": distance_table(slopes, tokens)}


def needs_ours(layer: torch.nn.Module) -> bool:
    """Whether a layer must not run its own code under a name of ours."""
    return type(layer).__name__ == "FalconAttention" and layer.config.alibi


def hide_masks(model: torch.nn.Module) -> None:
    """Patch the models in `model` that add slopes to their mask."""
    for module in list(model.modules()):
        if any(kind.__name__ == "FalconModel" for kind in type(module).__mro__) and module.use_alibi:
            put_on(module, HiddenMaskPatch())


class HiddenMask:
    """A mask that a model passes to its layers as it is."""

    ndim = 0

    def __init__(self, mask: object) -> None:
        self.mask = mask


class HiddenMaskPatch(RebindPatch):
    """A model whose mask does not show that it is one."""

    name = HIDDEN_MASK

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        if find_attention(module.config._attn_implementation) is None:
            return own(*args, **kwargs)
        make = type(module).forward
        while getattr(make, "__wrapped__", None) is not None:
            make = make.__wrapped__
        original = make.__globals__["create_causal_mask"]
        hidden: Mapping[str, Callable] = {"create_causal_mask": lambda **given: HiddenMask(original(**given))}
        return self.run(module, own, hidden, args, kwargs)


def shown(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a layer with the mask that its model has hidden."""
    mask = given.get("attention_mask")
    return {**given, "attention_mask": mask.mask} if isinstance(mask, HiddenMask) else given

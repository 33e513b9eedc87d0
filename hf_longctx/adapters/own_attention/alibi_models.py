"""BLOOM, MPT and Falcon: slopes times distances in their scores, and a rotation in most Falcons.

Falcon's model adds the slopes to its mask before its layers, and under any name but sdpa they add them once more. So
its layers run here whenever it has slopes, and its mask stays what it is ([`hide_masks`]).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...attention.alibi import alibi_slopes, key_table, mpt_slopes
from ...attention.distance_bias import ALIBI, KEY_BIAS
from ...attention.registry import find_attention
from ...parallel.segments import PAD_SEGMENT
from ..instance_forward import put_on
from ..pass_shard import ForwardRows
from ..rebind import RebindPatch
from .own_call import OwnCall


HIDDEN_MASK = "mask without slopes"


# A field of the configuration: "distance" (the default), or "key" for the numbers as transformers rounds them.
FORM, FORMS = "alibi_form", ("distance", "key")


def bloom(call: OwnCall) -> tuple[torch.Tensor, None]:
    """The forward of `BloomAttention`."""
    layer, given = call.module, call.given
    _refuse_holes(call)
    query, key, value = layer._reshape(layer.query_key_value(given["hidden_states"]))
    slopes = alibi_slopes(layer.num_heads).to(query.device)
    numbers = {ALIBI: slopes}
    if _original_form(call):
        numbers = {KEY_BIAS: key_table(slopes, call.shard.num_tokens, query.dtype)}
    dropout = layer.attention_dropout.p
    output = call.attend(query, key, value, dropout=dropout, scaling=layer.inv_norm_factor, is_causal=True, **numbers)
    dropped = call.function("dropout_add")(
        layer.dense(output), given["residual"], layer.hidden_dropout, layer.training
    )
    return dropped, None


def mpt(call: OwnCall) -> tuple[torch.Tensor, None]:
    """The forward of `MptAttention`. transformers adds its numbers in float32, so it has one form only."""
    layer, hidden_states = call.module, call.given["hidden_states"]
    mixed = layer.Wqkv(hidden_states)
    if layer.clip_qkv:
        mixed = mixed.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    heads = (part.unflatten(-1, (layer.n_heads, layer.head_dim)).transpose(1, 2) for part in mixed.chunk(3, dim=2))
    # The model of transformers never reads `attn_config.alibi_bias_max` and takes 8.
    numbers = {ALIBI: mpt_slopes(layer.n_heads).to(mixed.device)}
    output = call.attend(*heads, dropout=layer.attn_dropout_p, scaling=layer.softmax_scale, is_causal=True, **numbers)
    return layer.out_proj(output), None


def falcon(call: OwnCall) -> tuple[torch.Tensor, None]:
    """The forward of `FalconAttention`, with ALiBi or a rotation."""
    layer, given = call.module, call.given
    split = layer._split_heads(layer.query_key_value(given["hidden_states"]))
    query, key, value = (heads.transpose(1, 2) for heads in split)
    if not layer.config.alibi:
        query, key = call.function("apply_rotary_pos_emb")(query, key, *given["position_embeddings"])
        return layer.dense(call.attend(query, key, value, is_causal=True)), None
    _refuse_holes(call)
    # transformers keeps the slopes in bfloat16, and scales them with the scores.
    slopes = alibi_slopes(layer.num_heads).to(query.device, torch.bfloat16)
    numbers = {ALIBI: slopes.float() * layer.inv_norm_factor}
    if _original_form(call):
        numbers = {KEY_BIAS: key_table(slopes, call.shard.num_tokens, query.dtype) / math.sqrt(layer.head_dim)}
    output = call.attend(query, key, value, dropout=layer.attention_dropout.p, is_causal=True, **numbers)
    return layer.dense(output), None


def _original_form(call: OwnCall) -> bool:
    form = getattr(call.rows.config, FORM, "distance")
    if form not in FORMS:
        raise ValueError(
            f"`config.{FORM}` ({form!r}) must be 'distance', or 'key' for the numbers as transformers rounds them."
        )
    return form == "key"


def _refuse_holes(call: OwnCall) -> None:
    """Refuse a document that padding interrupts: BLOOM and Falcon count its tokens, and not its places.

    Raises:
        NotImplementedError: on every rank, since each knows the whole rows.
    """
    segments = call.shard.segment_ids
    if segments is None or call.shard.kernel_plans:  # asked by the first layer
        return
    starts = torch.nn.functional.pad(segments.diff(dim=1) != 0, (1, 0), value=True) & (segments != PAD_SEGMENT)
    documents = sum(len(row[row != PAD_SEGMENT].unique()) for row in segments)
    if int(starts.sum()) != documents:
        raise NotImplementedError(
            f"`attention_mask` has zeros between the tokens of a row, which `{type(call.module).__name__}` leaves out "
            "of its distances, and no attention of ours does: remove these tokens, or pad at one end only."
        )


def needs_ours(layer: torch.nn.Module) -> bool:
    """Whether a layer must not run its own code under a name of ours."""
    return any(kind.__name__ == "FalconAttention" for kind in type(layer).__mro__) and layer.config.alibi


def refuse_filled_cache(layer: torch.nn.Module, rows: ForwardRows) -> None:
    """Raise `NotImplementedError` for a Falcon with ALiBi that is to generate from a cache."""
    if rows.has_cache:
        raise NotImplementedError(
            f"`{type(layer).__name__}` adds its slopes twice after a cache under attn_implementation="
            f"{rows.attention!r}: generate with `use_cache=False`, or load the model on 'sdpa'."
        )


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

"""Attention layers with a code of their own, on rows that ranks share and on packed documents.

What: [`follow_own_attention`] finds the layers whose class is in [`FAMILIES`] and patches each instance. The patched
forward is the family's function: the layer's own projections, our attention function, the layer's own output.

A new family is a short function in a file of this package and one row in `FAMILIES`: by the name of the class of its
attention, `function(call) -> what the layer's forward returns`, with `call` an [`OwnCall`].

Without a shard and without packed documents transformers' own forward runs, on the mask that it would have got.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...attention.call_documents import shard_of_rows
from ...attention.deferred import DeferredMask
from ...attention.registry import find_attention
from ..instance_forward import PatchHandle, named_arguments, put_on
from ..pass_shard import ShardReader
from .alibi_models import HIDDEN_MASK, bloom, falcon, hide_masks, mpt, needs_ours, refuse_filled_cache, shown
from .bert import bert, big_bird, ibert, lilt, luke, roformer, squeezebert
from .counted_positions import COUNTED_TABLE, count_positions
from .decoders import bart, gpt_neox_japanese, image_gpt, openai_gpt, xlm
from .gpt_neo import gpt_neo
from .keywords import KEYWORDS, pass_keywords
from .mpnet import DISTANCES, mpnet, number_distances
from .own_call import OwnCall
from .row_checks import ROW_CHECK, check_rows


OWN_ATTENTION = "own attention"

# By class, with the folder of transformers where several classes have the name.
FAMILIES: dict[str, Callable[[OwnCall], Any]] = {
    "BigBirdAttention": big_bird,
    "BloomAttention": bloom,
    "FalconAttention": falcon,
    "GPTNeoSelfAttention": gpt_neo,
    "GPTNeoXJapaneseAttention": gpt_neox_japanese,
    "IBertSelfAttention": ibert,
    "ImageGPTAttention": image_gpt,
    "LiltSelfAttention": lilt,
    "LukeSelfAttention": luke,
    "MPNetSelfAttention": mpnet,
    "MegatronBertSelfAttention": bert,
    "MptAttention": mpt,
    "MvpAttention": bart,
    "RemBertSelfAttention": bert,
    "RoFormerSelfAttention": roformer,
    "SqueezeBertSelfAttention": squeezebert,
    "TapasSelfAttention": bert,
    "TrOCRAttention": bart,
    "VisualBertSelfAttention": bert,
    "XGLMAttention": bart,
    "flaubert.MultiHeadAttention": xlm,
    "openai.Attention": openai_gpt,
    "xlm.MultiHeadAttention": xlm,
}


def follow_own_attention(model: torch.nn.Module) -> PatchHandle:
    """Patch the attention layers of one model that do not use transformers' attention interface, or get no keywords.

    Args:
        model (`torch.nn.Module`): any; a model without such layers is left alone.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.
    """
    for module in list(model.modules()):
        if family_of(module) is not None:
            put_on(module, OwnAttentionPatch())
    count_positions(model)
    number_distances(model)
    pass_keywords(model)
    check_rows(model)
    hide_masks(model)
    return PatchHandle(model, HIDDEN_MASK, OWN_ATTENTION, COUNTED_TABLE, DISTANCES, KEYWORDS, ROW_CHECK)


def family_of(module: torch.nn.Module) -> Callable[[OwnCall], Any] | None:
    """The function for a module, by the class of transformers whose `forward` it runs, or `None`."""
    for kind in type(module).__mro__:
        if "forward" in vars(kind):
            if not kind.__module__.startswith("transformers.models."):
                return None
            folder = kind.__module__.split(".")[2]
            return FAMILIES.get(f"{folder}.{kind.__name__}", FAMILIES.get(kind.__name__))
    return None


class OwnAttentionPatch(ShardReader):
    """The family's function where rows are shared or packed, and the layer's own forward elsewhere."""

    name = OWN_ATTENTION

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows = self.rows_of_call(module)
        given = shown(named_arguments(module, args, kwargs))
        config = getattr(module, "config", None)
        entry = find_attention(getattr(config, "_attn_implementation", None) or rows.attention)
        family = family_of(module)
        shard = rows.shard
        if shard is None and entry is not None and needs_ours(module):
            refuse_filled_cache(module, rows)
            hidden_states = given["hidden_states"]
            num_rows, tokens = hidden_states.shape[:2]
            shard = shard_of_rows({"attention_mask": rows.padding}, num_rows, tokens, hidden_states.device)
        if shard is None or entry is None or family is None:
            return own(**_with_own_masks(given))
        return family(OwnCall(module, given, rows, shard, entry))


def _with_own_masks(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments in which a description of a mask is the mask that transformers would have built."""
    return {name: value.build("eager") if isinstance(value, DeferredMask) else value for name, value in given.items()}

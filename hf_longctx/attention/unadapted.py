"""What a configuration says against sharing or packing the rows of its model.

Trainers and `adapt` ask before the first step. A loop that calls neither is asked here, by the attention layers: they
see the configuration and the batch, and they run before a wrong number can leave the model. What no configuration
shows (a layer that mixes tokens on its own, a loss that is not a sum over tokens), `adapt` finds by running the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ..families import DROPS_SHARD, SHARDED_LAYERS, TOKEN_LAYERS, first_position, token_mixing
from ..parallel.adapted import is_marked
from ..parallel.shard import SequenceShard
from .implicit_positions import packs_documents


# Set in the configuration of a model whose rotation was replaced by ALiBi.
ON_ALIBI = "hf_longctx_alibi"
# Set in the configuration of a model whose layers were trained in two streams, and on modules that run so.
IN_TWO_STREAMS = "hf_longctx_reversible"
# Likewise, of a model with axial positions: shape and dims.
ON_AXIAL = "hf_longctx_axial"
_REMEDY = "call `hf_longctx.adapt(model, mesh)` once after loading"


def validate_config(name: str, config, layers: Sequence[str] | None = None) -> None:
    """Refuse a model whose rows no ranks can share, by its configuration.

    Args:
        name (`str`): of the model or layer, for the message.
        config (`PretrainedConfig`): of the whole model, or of its text part.
        layers (`Sequence[str]`, *optional*): kinds of layers whose state no adapter carries from rank to rank, with
            their classes; unset, all kinds that have a state.

    Raises:
        NotImplementedError: an encoder-decoder, or layers that mix tokens in their own way or have a state along the
            sequence.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"`{name}` is an encoder-decoder: its cross-attention reads two sequences of different lengths, which are "
            "not sharded; set `sequence_parallel_size` to 1."
        )
    refuse_token_mixing(name, config)
    other = layers_with_state(config) if layers is None else layers
    if other:
        remedy = f"{_REMEDY}, or " if layers is None else "add an adapter in `adapters/recurrent/layers.py`, or "
        raise NotImplementedError(
            f"`{name}` has layers of type {', '.join(other)}, whose state runs along the sequence and would start "
            f"anew on every rank{'' if layers is None else ', since no adapter carries it on'}: {remedy}set "
            "`sequence_parallel_size` to 1."
        )


def _refuse_router_loss(name: str, config, given: Mapping[str, object]) -> None:
    asked = given.get("output_router_logits")
    if getattr(config.get_text_config(), "output_router_logits", False) if asked is None else asked:
        raise NotImplementedError(
            f"the model of `{name}` adds the loss of its routers (`output_router_logits` True), a product of means "
            f"over tokens, to which shares do not add up: {_REMEDY}, which computes it of whole rows, or set it to "
            "False."
        )


def refuse_token_mixing(name: str, config) -> None:
    """Refuse a model of a type that is known to mix the tokens of a row in a way of its own.

    Raises:
        NotImplementedError: it is one of those in `families.MIXES_TOKENS`.
    """
    mixing = token_mixing(config)
    if mixing is not None:
        raise NotImplementedError(f"`{name}` {mixing} set `sequence_parallel_size` to 1, and do not pack.")


def refuse_dropped_shard(module: torch.nn.Module) -> None:
    """Refuse a call without a shard where several processes run and the model would not have passed one on.

    Raises:
        NotImplementedError: it is one of those in `families.DROPS_SHARD`, and no one looked at it before.
    """
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind not in DROPS_SHARD or is_marked(module) or not dist.is_available() or not dist.is_initialized():
        return
    processes = dist.get_world_size()
    if processes > 1:
        raise NotImplementedError(
            f"a model of type `{kind}` does not tell its attention whether rows are shared, and {processes} processes "
            f"run: {_REMEDY}, which finds out, or load it with attn_implementation='packed' for whole rows."
        )


def refuse_lost_alibi(module: torch.nn.Module, slopes: object) -> None:
    """Refuse a model that was saved on ALiBi, and whose layers rotate again.

    Raises:
        ValueError: its configuration says so, and the call has no slopes.
    """
    config = getattr(module, "config", None)
    if slopes is None and getattr(config, ON_ALIBI, False):
        raise ValueError(
            f"the model was trained on ALiBi (`config.{ON_ALIBI}`), but `{type(module).__name__}` passes no slopes to "
            "its attention: call `hf_longctx.use_alibi(model)` after loading it."
        )


def refuse_lost_patches(module: torch.nn.Module) -> None:
    """Refuse a model that was saved with reversible layers or axial positions, and runs without them.

    Raises:
        ValueError: its configuration says so, and nothing put them on the model of this module.
    """
    config, marks = getattr(module, "config", None), getattr(module, "__dict__", {})
    if getattr(config, ON_AXIAL, None) and ON_AXIAL not in marks:
        raise ValueError(
            f"the model was trained with axial positions (`config.{ON_AXIAL}`), but looks its positions up in one "
            "table: call `hf_longctx.use_axial_positions(model, *config.hf_longctx_axial)` after loading it."
        )
    if getattr(config, IN_TWO_STREAMS, False) and IN_TWO_STREAMS not in marks:
        raise ValueError(
            f"the model was trained with reversible layers (`config.{IN_TWO_STREAMS}`), but `{type(module).__name__}` "
            "runs in one stream, which is another model: call `hf_longctx.make_reversible(model)` after loading it."
        )


def layers_with_state(config) -> list[str]:
    """Kinds of layers, as in `config.layer_types`, that reach other tokens without attention."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return sorted({kind for kind in kinds if kind not in (*SHARDED_LAYERS, *TOKEN_LAYERS)})


def validate_unadapted(module: torch.nn.Module, shard: SequenceShard, given: Mapping[str, object]) -> None:
    """Refuse a batch that a model would get wrong, in a loop that never called `adapt`.

    Args:
        module (`torch.nn.Module`): an attention layer.
        shard ([`SequenceShard`]): of the call.
        given (`Mapping`): what the layer passes to its attention by name.

    Raises:
        NotImplementedError: other layers of the model, its positions, or the loss of its routers would be those of a
            share.
        ValueError: the batch has no positions, and this model does not count them from 0.
    """
    config = getattr(module, "config", None)
    if is_marked(module) or config is None or not hasattr(config, "get_text_config"):
        return
    name = type(module).__name__
    if shard.size > 1:
        validate_config(name, config)
        _refuse_router_loss(name, config, given)
    elif packs_documents(shard):
        refuse_token_mixing(name, config)
    other = layers_with_state(config) if packs_documents(shard) else []
    if other:
        raise NotImplementedError(
            f"a row packs several documents, but next to `{name}` there are layers of type {', '.join(other)}, whose "
            f"state may run on from one to the next: {_REMEDY}, which finds out, or do not pack."
        )
    first = first_position(config)
    if not shard.has_own_positions and first:
        kind = config.get_text_config().model_type
        raise ValueError(
            f"the batch has no `position_ids`, and `{kind}` does not count from 0 but from `pad_token_id` "
            f"+ 1 ({first}): add `position_ids` of shape (rows, tokens) before it is cut."
        )

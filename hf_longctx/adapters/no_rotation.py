"""ALiBi instead of a rotation, for a model that trains from scratch.

What: [`use_alibi`] takes one instance off its rotary embedding and gives its attention layers slopes. It is written
into `model.config`, so a saved model is put on ALiBi again by `adapt`, the trainers or `use_alibi`, and refused by our
attention where none of them was called.

How: a patch on every rotary embedding returns cosines of 1 and sines of 0, and one on every attention layer adds
`alibi_slopes` to the keyword arguments that it passes on. Weights, classes and registries stay as they are.
Price: the kernel adds the distances to its scores, see [`distance_bias`][hf_longctx.attention.distance_bias].
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..attention.alibi import alibi_slopes
from ..attention.distance_bias import ALIBI
from ..attention.registry import find_attention, name_that_packs
from ..attention.unadapted import ON_ALIBI
from .instance_forward import InstancePatch, PatchHandle, patch_on, put_on
from .rebind import called_names
from .rotary_lengths import is_rotary, rotations
from .wrapped import runs_our_attention, unwrap


SLOPES, NO_ROTATION = "slopes", "no rotation"
# How a layer of transformers calls its attention, and its rotation.
_INTERFACE, _ROTATES = "ALL_ATTENTION_FUNCTIONS", "rotary_pos_emb"


class AlibiHandle(PatchHandle):
    """What [`use_alibi`] returns; `remove()` gives the model its rotation back, and takes ALiBi out of its config."""

    def remove(self) -> None:
        super().remove()
        vars(unwrap(self.model).config).pop(ON_ALIBI, None)


def use_alibi(model: torch.nn.Module) -> AlibiHandle:
    """Let a model with rotary embeddings train with ALiBi instead, from random weights.

    Weights that were trained with a rotation know nothing without it: this is for training from scratch. The slopes
    are those of the paper. `save_pretrained` writes `hf_longctx_alibi` into the configuration. After `from_pretrained`
    call this or `adapt`, or build a trainer; until then our attention refuses the model.

    Args:
        model (`torch.nn.Module`): on an attention of ours (`"packed"`, `"ulysses"`); changed in place, on this
            instance only. Its attention layers call transformers' attention interface.

    Returns:
        [`AlibiHandle`]: `remove()` undoes it. A second call changes nothing.

    Raises:
        ValueError: it is no model of transformers, has no rotary embedding, or runs an attention of transformers,
            which has no slopes.
        NotImplementedError: its rotation is more than one (of images), or a layer that rotates has a code of its own.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"`{name}` is not a model of transformers, whose attention ALiBi is for: pass the model that has one."
        )
    if getattr(inner.config, "is_encoder_decoder", False) or inner.config.get_text_config() is not inner.config:
        raise NotImplementedError(
            f"`{name}` is more than a language model or an encoder of text (`{inner.config.model_type}`), and its "
            "other parts have positions of their own: use the class of its text part."
        )
    _refuse_other_attention(name, inner)
    rotary = [module for module in inner.modules() if is_rotary(module)]
    if not rotary:
        raise ValueError(
            f"`{name}` has no rotary embedding that ALiBi could replace: choose a model with one, such as Llama, Qwen "
            "or Mistral."
        )
    _validate_rotation(name, rotary)
    for layer in _attention_layers(name, inner):
        put_on(layer, _SlopesPatch(_heads_of(layer)))
    for module in rotary:
        put_on(module, _NoRotationPatch())
    if not getattr(inner.config, ON_ALIBI, False):
        own_config(inner)
        setattr(inner.config, ON_ALIBI, True)
    return AlibiHandle(model, SLOPES, NO_ROTATION)


def follow_alibi(model: torch.nn.Module) -> PatchHandle:
    """Put a model that was saved on ALiBi on it again; the handle names what was not there before."""
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    if not getattr(config, ON_ALIBI, False) or any(patch_on(module, SLOPES) for module in inner.modules()):
        return PatchHandle(model)
    return PatchHandle(model, *use_alibi(model).names)


def refuse_lost_alibi(model: torch.nn.Module) -> None:
    """Raise `ValueError` for a model that was saved on ALiBi and runs an attention of transformers."""
    inner = unwrap(model)
    if getattr(getattr(inner, "config", None), ON_ALIBI, False) and not runs_our_attention(model):
        _refuse_other_attention(type(inner).__name__, inner)


class _SlopesPatch(InstancePatch):
    """An attention layer that passes slopes on; below what else passes keywords to it."""

    name, lowest = SLOPES, True

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        _refuse_other_attention(type(module).__name__, module)
        tokens = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return own(*args, **{**kwargs, ALIBI: alibi_slopes(self.heads).to(tokens.device)})


class _NoRotationPatch(InstancePatch):
    """A rotary embedding whose angles are all 0."""

    name = NO_ROTATION

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rotated = own(*args, **kwargs)
        if not isinstance(rotated, tuple):  # complex numbers
            return torch.ones_like(rotated)
        cosines, sines = rotated
        return torch.ones_like(cosines), torch.zeros_like(sines)


def own_config(model) -> None:
    """Give an instance a configuration of its own: models that are built from one object share it."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own


def _refuse_other_attention(name: str, module: torch.nn.Module) -> None:
    attention = module.config._attn_implementation
    if find_attention(attention) is None:
        raise ValueError(
            f"`{name}` is on ALiBi (`config.{ON_ALIBI}`), which attn_implementation={attention!r} does not compute: "
            f"load it with attn_implementation={name_that_packs()!r}, or call "
            f"`model.set_attn_implementation({name_that_packs()!r})`."
        )


def _validate_rotation(name: str, rotary: list[torch.nn.Module]) -> None:
    """Refuse what is neither a pair of cosines and sines nor complex numbers, whatever its frequencies and scale."""
    for module in rotary:
        if not all(_is_rotation(parts) for parts in rotations(module)):
            raise NotImplementedError(
                f"`{type(module).__name__}` of `{name}` does not return cosines and sines of two-dimensional "
                "positions, so its rotation cannot be turned off: choose a model such as Llama, Qwen or Mistral."
            )


def _is_rotation(parts: tuple[torch.Tensor, ...]) -> bool:
    """Whether these are rotations, by the angle 0 for the first position."""
    if len(parts) == 1 and parts[0].is_complex():
        return not bool(parts[0][..., :1, :].imag.any())
    if len(parts) != 2 or any(tensor.is_complex() for tensor in parts):
        return False
    cosines, sines = (tensor[..., :1, :] for tensor in parts)
    return bool((cosines == cosines.max()).all() and cosines.all()) and not bool(sines.any())


def _attention_layers(name: str, model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that rotate, all of which can pass slopes on."""
    layers = []
    for module in model.modules():
        called, kind = called_names(type(module).forward), type(module).__name__
        takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(module).forward).parameters.values())
        if _INTERFACE in called and takes_more:
            layers.append(module)
        elif _INTERFACE in called or any(_ROTATES in word for word in called):
            raise NotImplementedError(
                f"`{kind}` of `{name}` rotates, but does not pass keyword arguments to transformers' attention "
                "interface, so it cannot be given slopes: choose a model such as Llama, Qwen or Mistral."
            )
    if not layers:
        raise NotImplementedError(
            f"`{name}` has no layer on transformers' attention interface that could be given slopes: choose a model "
            "such as Llama, Qwen or Mistral."
        )
    return layers


def _heads_of(layer: torch.nn.Module) -> int:
    own = getattr(layer, "num_heads", None)
    return own if isinstance(own, int) else layer.config.num_attention_heads

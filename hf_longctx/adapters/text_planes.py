"""Models with multimodal rotary positions keep the documents of a row apart on one process, too.

What: their decoders read documents from a plane of text positions, the first of `(axes + 1, rows, tokens)`. They get
positions of shape `(rows, tokens)` or `(axes, rows, tokens)` from almost everybody, read no documents from them, and
pass no positions on to their attention, which then cannot read any either.

How: patches `forward` of the decoder, which puts that plane in front where positions restart within a row. Everything
else is the decoder's own. Shared rows need none: their `sequence_shard` has the documents.

Price: a comparison of `B x T` integers a forward; the plane only for packed rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention.registry import packs_rows
from ..families import NO_TEXT_PLANE, POSITION_AXES, position_axes
from ..parallel.position_planes import has_planes, text_positions
from ..parallel.segments import DOCUMENT_BOUND_KEYS
from .instance_forward import InstancePatch, PatchHandle, named_arguments, put_on


TEXT_PLANE = "plane of text positions"


def add_text_planes(model: torch.nn.Module) -> PatchHandle:
    """Patch the decoders of one model whose rotary positions have planes; others are left alone.

    Args:
        model (`torch.nn.Module`): any. Adapters and wrappers may come before or after.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.
    """
    for module in list(model.modules()):
        if isinstance(module, PreTrainedModel) and module.config.model_type in POSITION_AXES.keys() - NO_TEXT_PLANE:
            takes = inspect.signature(type(module).forward).parameters
            if "position_ids" in takes and any("Rotary" in type(child).__name__ for child in module.children()):
                put_on(module, _DecoderPatch())
    return PatchHandle(model, TEXT_PLANE)


class _DecoderPatch(InstancePatch):
    """Gives the decoder a plane of text positions where a batch that no one cut packs documents by positions."""

    name = TEXT_PLANE

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given: dict[str, Any] = named_arguments(module, args, kwargs)
        planes = _with_text_plane(module, given)
        return own(*args, **kwargs) if planes is None else own(**{**given, "position_ids": planes})


def _with_text_plane(decoder: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor | None:
    positions, config = given.get("position_ids"), decoder.config
    axes = position_axes(config)
    told = ("sequence_shard", "attention_mask", *DOCUMENT_BOUND_KEYS)
    is_told = any(given.get(name) is not None for name in told)
    if axes == 0 or is_told or not isinstance(positions, torch.Tensor) or not packs_rows(config._attn_implementation):
        return None
    if positions.dim() not in (2, 3) or positions.shape[0] == axes + 1 and has_planes(positions):
        return None
    text = text_positions(given, axes)
    if text is None or not bool((text.diff(dim=-1) != 1).any()):
        return None
    planes = positions if has_planes(positions) else positions.expand(axes, *positions.shape)
    return torch.cat([text.expand(planes.shape[1:])[None], planes])

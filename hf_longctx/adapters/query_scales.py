"""Attention layers that scale their queries by positions that they count themselves, from 0 on every rank.

What: Llama 4 does so in the layers that rotate nothing, from position `floor_scale` on, whatever `position_ids` say.

How: patches `forward` of the layer and of its query projection. The layer's sees the call's `sequence_shard`, switches
its own scale off for the duration of the call, and the projection multiplies by the same formula at the right
positions, so numbers are transformers' to the bit. A recomputed layer runs through the same patch.

Price: one number a token and layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..attention.call_documents import shard_of_forward
from ..attention.implicit_positions import SCALES_FOLLOWED, local_positions
from ..families import scales_by_count
from .instance_forward import InstancePatch, named_arguments, patch_on, put_on


LAYER, PROJECTION = "positions of the scales", "scales of the queries"


def patch_scales(model: torch.nn.Module) -> None:
    """Patch every attention layer of `model` that scales its queries by a position that it counts."""
    for module in list(model.modules()):
        if scales_by_count(module) and hasattr(module, "q_proj"):
            put_on(module, _LayerPatch())


class _LayerPatch(InstancePatch):
    """Passes the scales of this call's tokens to the query projection."""

    name = LAYER

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given = named_arguments(module, args, kwargs)
        shard = shard_of_forward(module, given)
        positions = None if shard is None else local_positions(shard)
        if positions is None:
            return own(*args, **kwargs)
        if patch_on(module.q_proj, PROJECTION) is None:
            put_on(module.q_proj, _ProjectionPatch())
        patch, tunes = patch_on(module.q_proj, PROJECTION), module.attn_temperature_tuning
        positions = positions.to(given["hidden_states"].device)
        steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
        patch.scales = (torch.log1p(steps) * module.attn_scale + 1.0)[..., None]
        module.attn_temperature_tuning = False
        try:
            return own(*args, **{**kwargs, SCALES_FOLLOWED: True})
        finally:
            module.attn_temperature_tuning, patch.scales = tunes, None


class _ProjectionPatch(InstancePatch):
    """Scales queries, for the duration of one call."""

    name = PROJECTION

    def __init__(self) -> None:
        self.scales: torch.Tensor | None = None

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        queries = own(*args, **kwargs)
        # As transformers rounds it: in float32 or more, then back.
        return queries if self.scales is None else (queries * self.scales).to(queries.dtype)

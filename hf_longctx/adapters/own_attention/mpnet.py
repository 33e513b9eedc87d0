"""MPNet: its encoder makes one table of numbers for distances between tokens, which all layers add to their scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from ..instance_forward import put_on
from ..pass_shard import ShardReader
from .bert import layer_heads
from .own_call import OwnCall


DISTANCES = "numbers of distances"
_METHOD = "compute_position_bias"


def mpnet(call: OwnCall) -> tuple[torch.Tensor]:
    """The forward of `MPNetSelfAttention`; `position_bias` holds what [`DistancePatch`] made."""
    layer, hidden_states = call.module, call.given["hidden_states"]
    heads = (layer_heads(call, project(hidden_states)) for project in (layer.q, layer.k, layer.v))
    table = call.given.get("position_bias")
    return (layer.o(call.attend(*heads, dropout=layer.dropout.p, distance_bias=table)),)


def number_distances(model: torch.nn.Module) -> None:
    """Patch the encoders in `model` that make numbers of distances."""
    for module in list(model.modules()):
        if any(kind.__name__ == "MPNetEncoder" for kind in type(module).__mro__):
            put_on(module, DistancePatch(), _METHOD)


class DistancePatch(ShardReader):
    """Makes the numbers of all distances in whole rows, `(N, 2 T - 1)`, where transformers makes those of a call."""

    name = DISTANCES

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows = self.rows_of_call(module)
        if rows.shard is None:
            return own(*args, **kwargs)
        tokens = rows.shard.num_tokens
        buckets = inspect.signature(getattr(type(module), _METHOD)).parameters["num_buckets"].default
        table = module.relative_attention_bias
        distances = torch.arange(1 - tokens, tokens, device=table.weight.device)
        return table(module.relative_position_bucket(distances, num_buckets=buckets)).transpose(0, 1)

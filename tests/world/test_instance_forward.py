"""All adapters under FSDP2, which gives a module another class, put on before and after, and taken off again."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters import ADAPTERS


def sharded_run(name: str, first: str) -> tuple[float, bool, bool]:
    """How far the numbers of a sharded model with the adapter are from those of a plain one without; whether the
    adapter acts, and whether it still does after it was removed."""
    adapter = ADAPTERS[name]
    expected, model = adapter.run(adapter.build()), adapter.build()
    handle = adapter.attach(model) if first == "adapter" else None
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    handle = handle or adapter.attach(model)
    acts, error = adapter.acts(model), float((adapter.run(model) - expected).abs().max() / expected.abs().max())
    handle.remove()
    return error, acts, adapter.acts(model)


@pytest.mark.parametrize("first", ["adapter", "fsdp2"])
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_adapters_under_fsdp2(world2, name, first):
    if name == "packed embeddings":
        pytest.importorskip("sentence_transformers")
    for error, acts, acts_later in world2.run(sharded_run, name, first):
        assert error < 1e-5 and acts and not acts_later  # fp32, other order of sums

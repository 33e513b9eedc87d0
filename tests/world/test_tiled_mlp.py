"""MLPs in tiles under DDP, FSDP2 and shared rows: the weights of one untiled process, and no collective more."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longctx import SequenceMesh, shard_batch
from hf_longctx.adapters.tiled_mlp import tile_mlp
from hf_longctx.proof.ranks import RanksError

from ..models import build
from ..training import Rows, pad_right


STEPS, ROWS = 3, 4


class Collectives(TorchDispatchMode):
    """Counts the collectives of a block by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def wrap(model, wrapper: str):
    """The model inside its wrapper. `fsdp2` shards layers, `fsdp2_mlp` also every MLP by itself."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper.startswith("fsdp2"):
        everyone = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            if wrapper == "fsdp2_linear":
                fully_shard(layer.mlp.up_proj, mesh=everyone)
            if wrapper == "fsdp2_mlp":
                fully_shard(layer.mlp, mesh=everyone)
            fully_shard(layer, mesh=everyone)
        fully_shard(model, mesh=everyone)
    return model


def add_adapters(model) -> None:
    """LoRA inside attention and MLP; the rest is frozen."""
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"]), model)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)


def train(
    wrapper: str, size: int, tile_size: int | None, first: str = "tiles", checkpointing=None, lora: bool = False
):
    """Three steps of two micro-batches each; returns losses, full weights, collectives and gradients a parameter."""
    mesh = SequenceMesh.build(size)
    model = build("llama", "ulysses")
    if lora:
        add_adapters(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    model.train()
    if tile_size and first == "tiles":
        tile_mlp(model, tile_size)
    wrapped = wrap(model, wrapper)
    if tile_size and first == "wrapper":
        tile_mlp(wrapped, tile_size)
    hooks: dict[str, int] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, key=key: hooks.update({key: hooks.get(key, 0) + 1}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    rows, losses, collectives = Rows(STEPS * 2 * ROWS), [], Collectives()
    groups = dist.get_world_size() // size if dist.is_initialized() else 1
    mine = range(mesh.data_parallel_rank * ROWS // groups, (mesh.data_parallel_rank + 1) * ROWS // groups)
    with collectives:
        for step in range(STEPS):
            total = 0.0
            for micro in range(2):
                whole = [rows[(step * 2 + micro) * ROWS + i] for i in range(ROWS)]
                count = sum(sum(label != -100 for label in row["labels"][1:]) for row in whole)
                share = shard_batch(pad_right([whole[i] for i in mine]), mesh)
                share["num_items_in_batch"] = count / (
                    groups * size
                )  # the wrapper's mean over all ranks gives the sum
                loss = wrapped(**share).loss
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            if dist.is_initialized() and groups * size > 1:
                dist.all_reduce(total)
                total /= groups * size
            losses.append(float(total))
    weights = {
        key: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for key, p in model.named_parameters()
    }
    return losses, weights, collectives.counts, hooks


def assert_same(actual, expected) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    for name, weight in expected[1].items():
        error = (actual[1][name] - weight).abs().max() / weight.abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"


CHECKPOINTS = {"plain": None, "checkpointed": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


@functools.cache
def one_process(lora: bool = False):
    return train("none", 1, None, lora=lora)


@pytest.mark.parametrize(
    ("wrapper", "size", "checkpointing"),
    [
        *((wrapper, 2, how) for wrapper in ("ddp", "fsdp2", "fsdp2_mlp") for how in CHECKPOINTS),
        *((wrapper, 1, "checkpointed") for wrapper in ("ddp", "fsdp2_mlp")),  # rows apart: nothing of ours is sent
        ("fsdp2", 1, "plain"),
    ],
)
def test_tiles_in_two_processes_equal_one_untiled_process(world2, wrapper, size, checkpointing):
    expected = one_process()
    untiled = world2.run(train, wrapper, size, None, "tiles", CHECKPOINTS[checkpointing])
    tiled = world2.run(train, wrapper, size, 3, "tiles", CHECKPOINTS[checkpointing])
    for ours, theirs in zip(tiled, untiled):
        assert_same(ours, expected)
        assert ours[2] == theirs[2], "tiles added or lost a collective"
        assert set(ours[3].values()) == {STEPS * 2}
    assert abs(expected[0][0] - expected[0][-1]) > 1e-3


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2_mlp"])
def test_tiling_a_model_that_is_wrapped_already(world2, wrapper):
    expected = one_process()
    for ours in world2.run(train, wrapper, 2, 3, "wrapper"):
        assert_same(ours, expected)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2_mlp"])
def test_adapters_beside_frozen_weights(world2, wrapper):
    expected = one_process(lora=True)
    for ours in world2.run(train, wrapper, 2, 3, "tiles", {"use_reentrant": False}, True):
        assert_same(ours, expected)
        assert len(ours[3]) == 2 * 3 * 2 and set(ours[3].values()) == {STEPS * 2}


def test_fsdp2_inside_an_mlp_is_refused(world2):
    with pytest.raises(RanksError, match=re.escape("`model.layers.0.mlp.up_proj` is sharded by itself")):
        world2.run(train, "fsdp2_linear", 2, 3)

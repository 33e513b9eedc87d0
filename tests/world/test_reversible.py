"""Reversible layers under DDP, FSDP2 and shared rows: losses and weights of one process, one gradient a parameter."""

from __future__ import annotations

import contextlib
import functools
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from hf_longctx import SequenceMesh, adapt, make_reversible, shard_batch, use_axial_positions
from hf_longctx.adapters.tiled_mlp import tile_mlp
from hf_longctx.proof.ranks import RanksError

from ..models import build
from ..training import Rows, assert_same_trajectory, pad_right, steps
from ..training import train as trainer_run
from .test_tiled_mlp import add_adapters, assert_same


STEPS, ROWS = 2, 4


def wrap(model, wrapper: str):
    """`fsdp2` shards the whole model, `fsdp2_layers` also each layer by itself."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper.startswith("fsdp2"):
        everyone = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers if wrapper == "fsdp2_layers" else ():
            fully_shard(layer, mesh=everyone)
        fully_shard(model, mesh=everyone)
    return model


def train(
    wrapper: str,
    size: int,
    name="llama",
    reversible=True,
    first="reversible",
    lora=False,
    tiles=False,
    grid=(4, 6),
    **changes,
):
    """Two steps of two micro-batches each; returns losses, full weights and gradients a parameter."""
    mesh = SequenceMesh.build(size)
    model = build(name, "ulysses", num_hidden_layers=4 if name == "llama" else 2, **changes).train()
    if lora:
        add_adapters(model)
    if name == "gpt2":
        use_axial_positions(model, grid)
    if reversible and first == "reversible":
        make_reversible(model)
    if name != "llama":
        adapt(model, mesh)
    if tiles:
        tile_mlp(model, 3)
    wrapped = wrap(model, wrapper)
    if reversible and first == "wrapper":
        make_reversible(wrapped)
    hooks: dict[str, int] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, key=key: hooks.update({key: hooks.get(key, 0) + 1}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows, losses = Rows(STEPS * 2 * ROWS), []
    groups = dist.get_world_size() // size if dist.is_initialized() else 1
    mine = range(mesh.data_parallel_rank * ROWS // groups, (mesh.data_parallel_rank + 1) * ROWS // groups)
    for step in range(STEPS):
        total = 0.0
        for micro in range(2):
            whole = [rows[(step * 2 + micro) * ROWS + i] for i in range(ROWS)]
            count = sum(sum(label != -100 for label in row["labels"][1:]) for row in whole)
            share = shard_batch(pad_right([whole[i] for i in mine]), mesh)
            share["num_items_in_batch"] = count / (groups * size)
            waits = wrapper == "ddp" and micro == 0
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                loss = wrapped(**share).loss
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if groups * size > 1:
            dist.all_reduce(total)
            total /= groups * size
        losses.append(float(total))
    weights = {
        key: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for key, p in model.named_parameters()
    }
    return losses, weights, hooks


@functools.cache
def one_process(**options):
    return train("none", 1, **options)


@pytest.mark.parametrize(
    ("wrapper", "size", "options"),
    [
        ("ddp", 2, {}),
        ("ddp", 1, {"first": "wrapper"}),
        ("fsdp2", 2, {"tiles": True}),
        ("fsdp2", 1, {}),
        ("ddp", 2, {"lora": True}),
        ("ddp", 2, {"name": "lfm2"}),
        ("ddp", 2, {"name": "gpt_oss"}),
        ("ddp", 2, {"name": "gpt2"}),
    ],
)
def test_two_processes_equal_one(world2, wrapper, size, options):
    expected = one_process(**{k: v for k, v in options.items() if k in ("lora", "name")})
    for ours in world2.run(functools.partial(train, **options), wrapper, size):
        assert_same(ours, expected)
        assert set(ours[2].values()) == {STEPS * 2} and ours[2].keys() == expected[2].keys()
    one_stream = one_process(reversible=False)
    assert abs(expected[0][0] - one_stream[0][0]) > 1e-3


MEMORY = {"reversible_layers": True, "mlp_tile_size": 5, "loss_tile_size": 7}


def run_trainer(size, **options):
    return trainer_run(size, gradient_accumulation_steps=2, memory=MEMORY, **options)


def test_trainers_make_models_reversible_and_train_alike(world2, tmp_path):
    expected = run_trainer(1, per_device_train_batch_size=2, attention="packed")
    for actual in world2.run(run_trainer, 2):
        assert_same_trajectory(actual, expected, 3e-5)
    plain = trainer_run(1, gradient_accumulation_steps=2, attention="packed")
    assert abs(steps(plain[0])[0][0] - steps(expected[0])[0][0]) > 1e-3
    model = build("llama", "sdpa")  # saved so, and run on transformers' attention without saying so again
    make_reversible(model).model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    resumed = trainer_run(1, model=again, gradient_accumulation_steps=2)
    assert_same_trajectory(resumed, expected, 3e-5)


def test_a_trained_model_is_refused_before_the_first_step(tmp_path):
    build("llama", "sdpa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained in one stream"):
        trainer_run(1, AutoModelForCausalLM.from_pretrained(tmp_path), memory=MEMORY)
    with pytest.raises(NotImplementedError, match="has activation checkpointing"):
        trainer_run(1, attention="packed", memory=MEMORY, gradient_checkpointing=True)


def test_dropout_of_attention_is_the_same_in_backward(world2):
    for losses, *_ in world2.run(functools.partial(train, attention_dropout=0.1), "ddp", 2):
        assert all(torch.tensor(losses).isfinite())


def test_a_row_longer_than_the_axial_grid_is_refused_on_every_rank(world2):
    with pytest.raises(RanksError) as error:
        world2.run(functools.partial(train, name="gpt2", grid=(3, 6)), "none", 2)
    assert str(error.value).count("a row has 20 positions, but the axial grid (3, 6) has 18") == 2


def test_layers_that_are_sharded_by_themselves_are_refused(world2):
    with pytest.raises(RanksError, match=re.escape("is sharded by itself, and all reversible layers run inside one")):
        world2.run(train, "fsdp2_layers", 2)

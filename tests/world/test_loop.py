"""The code of `docs/loop.md`, run as it stands: weights equal one process's under DDP, FSDP2 and no wrapper."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_longctx import SequenceMesh, adapt

from ..models import build
from ..training import Rows, pad_right


PAGE = Path(__file__).parents[2] / "docs" / "loop.md"
GROUP_ROWS = 2


def documented_step():
    """`train_step` from the page."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "def train_step" in block]
    namespace: dict = {}
    exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace["train_step"]


def run_loop(wrapper: str, size: int, groups: int, attention: str, checkpointing: bool = False):
    """Four steps of two very uneven micro-batches; returns losses and full weights."""
    mesh = SequenceMesh.build(size)
    model = build("llama", attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    plain = model
    if wrapper != "fsdp2":
        adapt(model, mesh)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    if wrapper == "fsdp2":
        everyone = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=everyone)
        fully_shard(model, mesh=everyone)
        adapt(model, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    rows, step, losses = Rows(4 * 2 * groups * GROUP_ROWS), documented_step(), []
    mine = range(mesh.data_parallel_rank, groups, mesh.data_parallel_size)
    for number in range(4):
        micro_batches = []
        for micro in range(2):
            first = (number * 2 + micro) * groups * GROUP_ROWS
            picked = [rows[first + g * GROUP_ROWS + i] for g in mine for i in range(GROUP_ROWS)]
            micro_batches.append(pad_right(picked))
        losses.append(float(step(model, optimizer, micro_batches, mesh)))
    weights = {}
    for name, parameter in plain.named_parameters():
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        weights[name] = full.detach().clone()
    return losses, weights


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4), (4, 2)])
def test_the_documented_step_equals_one_process(worlds, world_size, size, wrapper):
    groups = world_size // size
    losses, weights = run_loop("none", 1, groups, "ulysses")
    for ours, theirs in worlds(world_size).run(run_loop, wrapper, size, groups, "ulysses"):
        assert ours == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            error = (theirs[name] - weight).abs().max() / weight.abs().max()
            assert error < 1e-5, f"{name}: {error:.1e}"
    assert abs(losses[0] - losses[-1]) > 1e-2


def test_fsdp2_with_activation_checkpointing(world2):
    losses, _ = run_loop("none", 1, 1, "ulysses")
    for ours, _ in world2.run(run_loop, "fsdp2", 2, 1, "ulysses", True):
        assert ours == pytest.approx(losses, rel=1e-5)


def test_one_process_on_ulysses_is_one_process_on_sdpa():
    """The loop's reference is itself checked against the stock kernel and a plain mean."""
    model, batch = build("llama", "sdpa"), pad_right([Rows(4)[1], Rows(4)[2]])
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    ours = build("llama", "ulysses")
    adapt(ours, SequenceMesh.build())
    documented_step()(ours, torch.optim.SGD(ours.parameters(), lr=1.0), [batch], SequenceMesh.build())
    before = dict(build("llama", "ulysses").named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(before[name] - parameter, expected[name], rtol=1e-4, atol=1e-6)


def compiled_gradients(size):
    """`torch.compile` around a sharded model, on the part of the compiler that traces gradients."""
    model = build("llama", "ulysses")
    compiled = torch.compile(model, backend="aot_eager")
    mesh = SequenceMesh.build(size)
    from hf_longctx import shard_batch

    for row in (1, 2):
        batch = shard_batch(pad_right([Rows(4)[row]]), mesh)
        compiled(**batch).loss.backward()
    gradients = {name: p.grad / size for name, p in model.named_parameters()}
    if size > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=mesh.sp_group)
    return gradients


def test_a_compiled_model_keeps_its_gradients(world2):
    model = build("llama", "sdpa")
    for row in (1, 2):
        model(**pad_right([Rows(4)[row]])).loss.backward()
    for actual in world2.run(compiled_gradients, 2):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-4, atol=1e-6)

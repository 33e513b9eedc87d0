"""QLoRA on shared and packed rows: gradients of one process, and of documents that are run one by one."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hf_longctx

from ..few_bits import lora_gradients, one_by_one, packed_documents, qlora, qlora_stock
from ..models import build
from ..training import Rows, assert_same_trajectory, train


pytest.importorskip("bitsandbytes")


def packed(wrapper: str, storage: str, checkpointing: bool):
    """One packed row on all ranks: its loss, the gradients, and what this rank holds of the 4-bit weights."""
    mesh = hf_longctx.SequenceMesh.build(dist.get_world_size())
    model = qlora(build("llama", "sdpa"), "ulysses", storage).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    plain = model
    if wrapper == "ddp":
        hf_longctx.adapt(model, mesh)
        model = DistributedDataParallel(model)
    else:
        everyone = init_device_mesh("cpu", (dist.get_world_size(),))
        whole = {p for p in model.parameters() if not p.is_floating_point()}  # as accelerate does
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=everyone, ignored_params=whole)
        fully_shard(model, mesh=everyone, ignored_params=whole)
        hf_longctx.adapt(model, mesh)
    batch = packed_documents()
    share = hf_longctx.shard_batch(batch, mesh, model)
    num_items = (share["shift_labels"] != -100).sum()
    dist.all_reduce(num_items)
    share["num_items_in_batch"] = num_items / mesh.world_size
    loss = model(**share).loss
    loss.backward()
    total = loss.detach() / mesh.world_size
    dist.all_reduce(total)
    return float(total), lora_gradients(plain), held_bytes(plain)


def held_bytes(model) -> int:
    """What the 4-bit weights take on this rank."""
    layers = [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in layers]
    return sum(p.numel() * p.element_size() for p in local)


@pytest.mark.parametrize(
    ("wrapper", "storage", "checkpointing"),
    [("ddp", "uint8", False), ("ddp", "float32", True), ("fsdp2", "uint8", True), ("fsdp2", "float32", False)],
)
def test_gradients_of_a_packed_row_on_two_ranks_are_those_of_its_documents(world2, wrapper, storage, checkpointing):
    loss, gradients = one_by_one()
    whole = held_bytes(qlora(build("llama", "sdpa")))
    assert len(gradients) == 28 and all(gradient.abs().max() > 1e-6 for gradient in gradients.values())
    for ours, theirs, held in world2.run(packed, wrapper, storage, checkpointing):
        assert ours == pytest.approx(loss, rel=1e-5)
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (theirs[name] - gradient).abs().max() / gradient.abs().max()
            assert error < 2e-5, f"{name}: {error:.1e}"
        # FSDP2 shards what is stored as floating point; the rest stays whole on every rank.
        shared = 2 if (wrapper, storage) == ("fsdp2", "float32") else 1
        assert held == whole // shared


def run_here(size: int, changes: dict):
    return train(size, prepare=qlora, **changes)


def test_a_run_with_evaluations_between_its_steps(world2):
    """On a CPU an evaluation would leave the 4-bit weights without a backward; `Trainer` itself is run without one."""
    expected = train(0, prepare=qlora_stock)
    changes = {"eval_strategy": "steps", "eval_steps": 1, "trainer_options": {"eval_dataset": Rows(3)}}
    for actual in world2.run(run_here, 2, changes):
        assert_same_trajectory(actual, expected, 2e-5)

"""The tiled loss on two ranks: under DDP and FSDP2, with rows of a rank's own and with shared rows, as one process.

Trajectories and gradients are compared at 1e-5 of a tensor's largest entry, as everywhere in this folder: sums over
ranks are taken in another order, and one step's rounding goes into the next.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_longctx import SequenceMesh, adapt
from hf_longctx.adapters.tiled_loss import tile_loss
from hf_longctx.adapters.tiled_loss_check import prove_tiled_loss

from ..models import build
from ..training import Rows, pad_right
from .test_loop import documented_step


TILE = 6
ROWS = (1, 5, 2, 3)  # of `Rows`; 5 has two tokens, 1 two targets
WRAPPERS = ("ddp", "fsdp2", "fsdp2, head alone", "fsdp2, only the head")


def model_of(kind: str, attention: str = "sdpa"):
    model = build("llama", attention, tie_word_embeddings=kind == "tied")
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config)
    return model


def wrap(model, wrapper: str, **policy):
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper != "none":
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), **policy}
        for layer in inner.model.layers if "only" not in wrapper else ():
            fully_shard(layer, **options)
        if "head" in wrapper:
            fully_shard(inner.lm_head, **options)
        if "only" not in wrapper:
            fully_shard(model, **options)
    return model


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients_of(kind: str, wrapper: str, tile: bool, first: bool, size: int) -> tuple[float, dict, Counter]:
    """One backward of four rows, every rank on its own; what each parameter's hook saw is counted."""
    plain = model_of(kind)
    if tile and first:
        tile_loss(plain, TILE)
    model = wrap(plain, wrapper)
    if tile and not first:
        tile_loss(model, TILE)
    calls: Counter = Counter()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.update([name]))
    rank = dist.get_rank() if size > 1 else 0
    batch = pad_right([Rows()[i] for i in ROWS])
    num_items = int((batch["labels"][:, 1:] != -100).sum()) / size
    mine = {key: value.chunk(size)[rank] for key, value in batch.items()}
    loss = model(**mine, num_items_in_batch=num_items).loss
    loss.backward()
    if wrapper == "fsdp2, only the head":  # the rest has no wrapper that takes the mean over ranks
        for name, parameter in plain.named_parameters():
            if "lm_head" not in name and parameter.grad is not None:
                dist.all_reduce(parameter.grad.div_(size))
    total = loss.detach() / size
    if size > 1:
        dist.all_reduce(total)
    return total.item(), {n: full(p.grad) for n, p in plain.named_parameters() if p.grad is not None}, calls


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, theirs in expected.items():
        error = (actual[name] - theirs).abs().max() / theirs.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["untied", "tied", "lora"])
def test_gradients_of_two_ranks_are_those_of_one(world2, kind, wrapper):
    if "head" in wrapper and kind == "tied":
        pytest.skip("FSDP2 shards a tied weight with the module that has both its uses")
    if kind == "lora":
        pytest.importorskip("peft")
    loss, gradients, _ = gradients_of(kind, "none", False, False, 1)
    for first in (True, False):
        for ours, found, calls in world2.run(gradients_of, kind, wrapper, True, first, 2):
            assert ours == pytest.approx(loss, rel=1e-5)
            assert_same(found, gradients)
            assert set(calls.values()) <= {1}, "a hook fired twice"
            if wrapper == "ddp":
                assert calls.keys() == gradients.keys()


def trajectory(wrapper: str, tile: bool, size: int, attention: str):
    """The documented loop: four steps of two uneven micro-batches."""
    mesh, plain = SequenceMesh.build(size), build("llama", attention)
    model = wrap(plain, wrapper)
    adapt(plain, mesh)
    if tile:
        tile_loss(model, TILE)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    rows, step, losses = Rows(16), documented_step(), []
    for number in range(4):
        micro_batches = [pad_right([rows[4 * number + 2 * micro + i] for i in range(2)]) for micro in range(2)]
        losses.append(float(step(model, optimizer, micro_batches, mesh)))
    return losses, {name: full(parameter) for name, parameter in plain.named_parameters()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2, head alone"])
def test_shared_rows_follow_the_trajectory_of_one_process(world2, wrapper):
    losses, weights = trajectory("none", False, 1, "sdpa")
    for ours, found in world2.run(trajectory, wrapper, True, 2, "ulysses"):
        assert ours == pytest.approx(losses, rel=1e-5)
        assert_same(found, weights)
    assert abs(losses[0] - losses[-1]) > 1e-2


def mixed_precision(wrapper: str, tile: bool) -> tuple[float, dict]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = wrap(model_of("untied"), wrapper, mp_policy=policy)
    if tile:
        tile_loss(model, TILE)
        prove_tiled_loss(model)
    batch = pad_right([Rows()[i] for i in ROWS])
    loss = model(**batch, num_items_in_batch=257.25).loss  # which bf16 would round to 258
    loss.backward()
    return loss.item(), {name: full(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp2, head alone"])
def test_mixed_precision_of_fsdp2(world2, wrapper):
    """bf16 keeps 8 bits, and transformers and tiles round at other places; the count is not rounded at all."""
    stock, tiled = world2.run(mixed_precision, wrapper, False), world2.run(mixed_precision, wrapper, True)
    for (expected, gradients), (actual, found) in zip(stock, tiled):
        assert actual == pytest.approx(expected, rel=1e-3)
        assert found.keys() == gradients.keys()
        for name, theirs in gradients.items():
            assert (found[name] - theirs).norm() < 3e-2 * theirs.norm(), name


def proved(wrapper: str, size: int) -> bool:
    model = wrap(model_of("untied"), wrapper)
    prove_tiled_loss(model)
    before = gradients_after(model)
    tile_loss(model, TILE)
    prove_tiled_loss(model)
    after = gradients_after(model)
    assert_same(after, before)
    return True


def gradients_after(model) -> dict:
    """A backward still works after the proof, whose own went down to the embeddings only."""
    model(**pad_right([Rows()[i] for i in ROWS])).loss.backward()
    found = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2, head alone"])
def test_the_proof_runs_on_wrapped_models(world2, wrapper):
    assert world2.run(proved, wrapper, 2) == [True, True]


def empty_rank(wrapper: str) -> bool:
    """One rank has no target at all, and others wait for its part of the gradients."""
    model = wrap(model_of("untied"), wrapper)
    tile_loss(model, TILE)
    batch = pad_right([Rows()[i] for i in ROWS])
    if dist.get_rank() == 1:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    model(**batch, num_items_in_batch=10).loss.backward()
    return all(p.grad is not None and full(p.grad).isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2, head alone"])
def test_a_rank_without_targets_runs_backward(world2, wrapper):
    assert world2.run(empty_rank, wrapper) == [True, True]


def sharded_weight() -> str:
    from hf_longctx.losses.tiled_logits import tiled_cross_entropy

    head = torch.nn.Linear(8, 12)
    fully_shard(head, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        tiled_cross_entropy(torch.randn(3, 8), head.weight, torch.tensor([1, 2, 3]))
    except ValueError as error:
        return str(error)
    return ""


def test_a_shard_of_a_weight_is_refused(world2):
    assert all("`weight` is sharded (`DTensor`)" in message for message in world2.run(sharded_weight))

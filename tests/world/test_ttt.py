"""Models with fast weights on two processes: rows are assigned to ranks, and the steps are those of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_longctx.ttt import fast_model
from tests.fast_weights import tiny_ttt, tokens


# Rows of two micro-batches, with unequal numbers of labels.
LENGTHS = ((29, 13), (20, 8))


def batch(step: int, row: int) -> dict[str, torch.Tensor]:
    ids = tokens(1, LENGTHS[step][row], seed=7 * step + row)
    labels = ids.clone()
    labels[:, : 3 + step] = -100
    return {"input_ids": ids, "labels": labels}


def count() -> int:
    return sum(int((batch(step, row)["labels"][:, 1:] != -100).sum()) for step in (0, 1) for row in (0, 1))


def alone() -> tuple[float, dict[str, torch.Tensor]]:
    """One process: every row of the step by itself, added up."""
    model, total = tiny_ttt().train(), 0.0
    for step in (0, 1):
        for row in (0, 1):
            loss = model(**batch(step, row), num_items_in_batch=count()).loss
            loss.backward()
            total += float(loss.detach())
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def _two_ranks(wrapper: str, levels: int) -> tuple[float, dict[str, torch.Tensor]]:
    previous, fast_model.recomputation_levels = fast_model.recomputation_levels, lambda chunks: levels
    try:
        model = tiny_ttt().train()
        if levels:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inner = model
        if wrapper == "ddp":
            model = DistributedDataParallel(model)
        else:
            model = fully_shard(model)
        rank, total = dist.get_rank(), torch.zeros((), dtype=torch.float64)
        for step in (0, 1):
            if wrapper == "ddp":
                model.require_backward_grad_sync = step == 1
            # the wrapper averages over ranks
            loss = model(**batch(step, rank), num_items_in_batch=count()).loss * 2
            loss.backward()
            total += loss.detach() / 2
        dist.all_reduce(total)
        found = {}
        for name, parameter in inner.named_parameters():
            gradient = parameter.grad
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
        return float(total), found
    finally:
        fast_model.recomputation_levels = previous


def _finer_units() -> list[str]:
    said = []
    for part in ("base.model.layers.2", "primes", "base.lm_head", "base.model.layers.0"):
        model = tiny_ttt().train()
        fully_shard(model.get_submodule(part))
        fully_shard(model)
        try:
            model(**batch(0, dist.get_rank())).loss.backward()
            said.append("")
        except NotImplementedError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def expected():
    return alone()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_two_ranks_with_accumulation_take_the_step_of_one(world2, expected, wrapper, levels):
    loss, gradients = copy.deepcopy(expected)
    for total, found in world2.run(_two_ranks, wrapper, levels):
        assert abs(total - loss) <= 1e-12 and found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).abs().max() <= 1e-12 * max(1.0, float(gradient.abs().max())), name


def test_units_of_fsdp_in_the_suffix_are_refused_and_before_it_are_fine(world2):
    for layer, primes, head, before in world2.run(_finer_units):
        assert "`base.model.layers.2` is an FSDP2 unit of its own" in layer
        assert "`primes` is an FSDP2 unit" in primes and "`base.lm_head` is an FSDP2 unit" in head
        assert before == ""

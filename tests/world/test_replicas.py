"""Ranks whose numbers drift apart are named: in the same step, on every rank, by name, rank and value."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from hf_longctx.resilience.replicas import ReplicaGuard, checksums

from ..training import train


class Disturb(TrainerCallback):
    """At the end of step 2, change one thing on one rank."""

    def __init__(self, what: str, rank: int) -> None:
        self.what, self.rank = what, rank

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step != 2 or args.process_index != self.rank:
            return
        weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
        if self.what == "weight":  # by the smallest step there is
            weight.data[3, 5] = torch.nextafter(weight.data[3, 5], torch.tensor(9.0))
        elif self.what == "two weights":
            weight.data[0, 0] += 1
            model.get_parameter("model.norm.weight").data[7] += 1
        elif self.what == "optimizer":
            optimizer.state[weight]["exp_avg_sq"][1, 1] = 7.0
        elif self.what == "missing":
            optimizer.state[weight].pop("exp_avg")
        elif self.what == "rate":
            optimizer.param_groups[0]["lr"] = 0.25
        elif self.what == "random":
            torch.rand(1)


def disturb(size: int, what: str, rank: int, options: dict) -> tuple[str | None, int]:
    """The error, if any, and the last step that was logged."""
    from ..training import reset_state

    seen = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    callbacks = [Disturb(what, rank), Count()]
    try:
        train(size, optim="adamw_torch", learning_rate=1e-3, trainer_options={"callbacks": callbacks}, **options)
    except RuntimeError as error:
        return str(error), seen[-1]
    finally:
        reset_state()
    return None, seen[-1]


FOUND = {
    "weight": "parameter `model.layers.1.mlp.up_proj.weight` on rank 1, first at [3, 5]: ",
    "two weights": "parameter `model.layers.1.mlp.up_proj.weight` on rank 1, first at [0, 0]: ",
    "optimizer": "optimizer state `exp_avg_sq` of `model.layers.1.mlp.up_proj.weight` on rank 1, first at [1, 1]: ",
    "missing": "optimizer state `exp_avg` of `model.layers.1.mlp.up_proj.weight` is ",
    "rate": "`lr` of the optimizer's group 0 is ",
}


@pytest.mark.parametrize("what", FOUND)
def test_drift_of_one_rank_raises_on_all_with_its_name(world2, what):
    results = world2.run(disturb, 2, what, 1, {"context": {"check_replicas": 2}})
    assert results[0] == results[1]
    message, last_step = results[0]
    assert "ranks that must hold the same numbers differ after step 2: " + FOUND[what] in message
    assert "look for code that runs on one rank only" in message
    assert last_step == 1, "no rank began a third step"
    if what == "optimizer":
        assert "7.0 on rank 1" in message
    if what == "rate":
        assert "on rank 0, 0.25 on rank 1" in message


def test_the_rank_that_is_alone_is_the_one_that_differs(world4):
    """Four ranks: three agree, so the fourth is named; also where it comes first."""
    for rank in (0, 2):
        for message, _ in world4.run(disturb, 2, "weight", rank, {"context": {"check_replicas": 1}}):
            assert f"up_proj.weight` on rank {rank}, first at [3, 5]" in message


def test_drift_before_the_last_step_is_found_at_the_end_whatever_the_interval(world2):
    for message, last_step in world2.run(disturb, 1, "weight", 1, {}):
        assert "after step 4: " in message and last_step == 3


def test_nothing_is_compared_when_it_is_off(world2):
    options = {"context": {"check_replicas": 0}}
    assert world2.run(disturb, 1, "weight", 1, options) == [(None, 3), (None, 3)]


def with_dropout(model):
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return model


def test_random_state_must_agree_where_dropout_draws_from_it_within_a_group(world4):
    """Two groups of two: rank 3 draws once more than rank 2, with which it shares rows."""
    options = {"context": {"check_replicas": 2}}
    assert world4.run(disturb, 2, "random", 3, options) == [(None, 3)] * 4  # nobody draws
    for message, _ in world4.run(disturb, 2, "random", 3, {**options, "prepare": with_dropout}):
        assert "torch's random state on rank 3 is not that of rank 2" in message
    options["attention"] = "ulysses"
    assert world4.run(disturb, 1, "random", 3, {**options, "prepare": with_dropout}) == [(None, 3)] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (64, 2)])
def test_checksum_sees_every_single_entry(dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    device = torch.device("cpu")
    whole = checksums([tensor], device)
    assert whole == checksums([tensor.clone()], device)
    for index in range(tensor.numel()):
        other = tensor.clone()
        flat = other.view(-1)
        flat[index] = ~flat[index] if dtype == torch.bool else flat[index] + 1
        assert checksums([other], device) != whole, index


def test_checksum_of_a_view_is_that_of_its_numbers():
    base = torch.arange(40.0)
    for view in (base[1:8], base[3:].view(37)[::2], base.view(8, 5).T):
        assert checksums([view], torch.device("cpu")) == checksums([view.clone().contiguous()], torch.device("cpu"))


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_interval_must_be_a_positive_integer(every):
    with pytest.raises(ValueError, match="`every` .* must be a positive integer"):
        ReplicaGuard(every=every)


def compare_under_fsdp2(what: str):
    """Every rank holds another part of the weights, which is no drift; what FSDP2 replicates is compared."""
    from types import SimpleNamespace

    from torch.distributed.fsdp import fully_shard

    from hf_longctx.resilience.nonfinite import has_finite_step

    from ..models import build

    model, rank = build("llama", "sdpa"), torch.distributed.get_rank()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(3, 13).view(1, 10) + rank
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    finite = bool(has_finite_step(model, [loss.detach()]))
    if what == "gradient" and rank == 1:
        model.model.norm.weight.grad.to_local()[0] = torch.inf
    elif what == "counter" and rank == 1:
        optimizer.param_groups[0]["lr"] = 0.5
    spoiled = bool(has_finite_step(model, [loss.detach()]))
    optimizer.step()
    arguments = SimpleNamespace(device=torch.device("cpu"))
    try:
        ReplicaGuard(every=1).on_step_end(arguments, SimpleNamespace(global_step=1), None, model, optimizer)
    except RuntimeError as error:
        return finite, spoiled, str(error)
    return finite, spoiled, None


def test_parts_of_fsdp2_are_not_compared_and_what_it_replicates_is(world2):
    assert world2.run(compare_under_fsdp2, "nothing") == [(True, True, None)] * 2
    for _, _, message in world2.run(compare_under_fsdp2, "counter"):
        assert "`lr` of the optimizer's group 0 is 0.001 on rank 0, 0.5 on rank 1" in message
    assert [spoiled for _, spoiled, _ in world2.run(compare_under_fsdp2, "gradient")] == [True, False]

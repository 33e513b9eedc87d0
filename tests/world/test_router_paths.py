"""The loss of routers on shares in loops, in TRL's trainer, under overridden losses and in `verify`."""

from __future__ import annotations

import dataclasses
import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer

from hf_longctx import LongContextConfig, LongContextTrainer, SequenceMesh, adapt, shard_batch
from hf_longctx.adapters.tiled_loss import tile_loss
from hf_longctx.proof.model_under_test import KINDS, ModelUnderTest, Setting
from hf_longctx.proof.ranks import RanksError
from hf_longctx.proof.result import EXACT
from hf_longctx.proof.verification import run_proof

from ..models import build
from ..overrides import logs, scales, with_compute_loss
from ..training import Rows, arguments, assert_same_trajectory, pad_right, reset_state, train, weights_of
from . import test_sft
from .test_loop import documented_step
from .test_router_losses import ROUTED, routed


# Loops


def run_loop(size: int, groups: int, attention: str, wrapper: str = "none"):
    """Two steps of two micro-batches of every group; returns losses and weights."""
    mesh = SequenceMesh.build(size)
    plain = model = build("gpt_oss", attention, **ROUTED)
    if wrapper == "fsdp2":
        everyone = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=everyone)
    adapt(model, mesh)
    if wrapper == "fsdp2":
        tile_loss(model, 4)
    if wrapper == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows, step, losses = Rows(8 * groups), documented_step(), []
    mine = range(mesh.data_parallel_rank, groups, mesh.data_parallel_size)
    for number in range(2):
        batches = []
        for micro in range(2):
            first = (number * 2 + micro) * groups * 2
            batches += [pad_right([rows[first + 2 * group + i] for i in range(2)]) for group in mine]
        losses.append(float(step(model, optimizer, batches, mesh)))
    full = {name: getattr(item, "full_tensor", lambda item=item: item)() for name, item in plain.named_parameters()}
    return losses, {name: item.detach().clone() for name, item in full.items()}


@pytest.mark.parametrize(("world_size", "size", "wrapper"), [(2, 2, "fsdp2"), (4, 2, "ddp"), (2, 1, "ddp")])
def test_the_documented_step_equals_one_process(worlds, world_size, size, wrapper):
    groups = world_size // size
    losses, weights = run_loop(1, groups, "ulysses")
    for ours, theirs in worlds(world_size).run(run_loop, size, groups, "ulysses", wrapper):
        assert ours == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            error = (theirs[name] - weight).abs().max() / weight.abs().max()
            assert error < 1e-5, f"{name}: {error:.1e}"


def refusals_of_loops(size: int) -> list[str]:
    mesh, found = SequenceMesh.build(size), []
    batch = {"input_ids": torch.arange(3, 18)[None], "labels": torch.arange(3, 18)[None]}
    shard = shard_batch(batch, mesh)
    flag = {"output_router_logits": True}

    def note(model, **changes):
        try:
            model(**{**shard, **changes})
            found.append("")
        except NotImplementedError as error:
            found.append(str(error))
        dist.barrier()

    note(routed("mixtral", "ulysses"))  # never adapted
    asked = routed("mixtral", "ulysses")
    asked.config.output_router_logits = False
    note(asked)
    note(asked, **flag)
    adapt(asked, mesh)
    note(asked, **flag)
    shard["sequence_shard"] = _weighing(shard["sequence_shard"], 2.0)
    note(asked, **flag, return_dict=False)
    kind, own = type(asked), type(asked).forward
    for forward in (_computes_its_own, _balances_elsewhere, _averages, _breaks):
        kind.forward = _instead(own, forward)
        try:
            if forward is _computes_its_own:
                note(asked, **flag)
                continue
            fresh = routed("mixtral", "ulysses")
            fresh.config.output_router_logits = True
            try:
                adapt(fresh, mesh)
            except NotImplementedError as error:
                found.append(str(error))
        finally:
            kind.forward = own
    type(asked.model.layers[0].mlp.gate).forward = _flattened
    note(asked, **flag)
    return found


def _instead(own, forward):
    @functools.wraps(own)
    def wrapper(self, *args, **kwargs):
        return forward(own, self, *args, **kwargs)

    return wrapper


def _computes_its_own(own, self, *args, labels=None, **kwargs):
    outputs = own(self, *args, **kwargs)
    outputs["loss"] = outputs.logits.mean() + outputs.aux_loss
    return outputs


def _balances_elsewhere(own, self, *args, **kwargs):
    """A loss of routers of hidden states, which are those of a share."""
    outputs = own(self, *args, **kwargs)
    if kwargs.get("output_router_logits") is not False and outputs.get("loss") is not None:
        outputs["loss"] = outputs["loss"] + outputs.logits.flatten(0, 1).softmax(-1).mean(0).square().sum()
    return outputs


def _averages(own, self, *args, num_items_in_batch=None, **kwargs):
    return own(self, *args, **kwargs)


def _weighing(shard, weight: float):
    return dataclasses.replace(shard, batch_weight=weight)


def _breaks(own, self, *args, **kwargs):
    if kwargs.get("output_router_logits") and kwargs.get("labels") is not None:
        raise AttributeError("'int' object has no attribute 'to'")  # as transformers 5.17 says of GraniteMoe
    return own(self, *args, **kwargs)


_GATE = tf.models.mixtral.modeling_mixtral.MixtralTopKRouter.forward


def _flattened(self, hidden):
    logits, *others = _GATE(self, hidden)
    return logits.flatten(), *others


def run_refusals(size: int) -> list[str]:
    kind = tf.models.mixtral.modeling_mixtral.MixtralTopKRouter
    try:
        return refusals_of_loops(size)
    finally:
        kind.forward = _GATE


def test_loops_refuse_what_they_cannot_do_by_its_cause(world2):
    for found in world2.run(run_refusals, 2):
        bare, off, asked, adapted, in_a_tuple, own, elsewhere, averages, broken, flat = found
        assert "adds the loss of its routers" in bare and "hf_longctx.adapt" in bare
        assert off == adapted == "" and asked == bare
        assert "returns a tuple, in which its router loss cannot be weighted" in in_a_tuple
        assert "one that it does not compute by `self.loss_function` (0 calls)" in own
        assert "has another loss of its routers when its rows are sharded" in elsewhere
        assert "does not obey `num_items_in_batch`, and the one that would replace it lacks" in averages
        assert "cannot compute the loss of its routers in one process either (AttributeError" in broken
        assert "in which no dimension is that of the tokens" in flat


# TRL


def fit(size: int, attention: str = "ulysses", **changes):
    """TRL's trainer (`size` 0) or ours on a model with routers."""
    kept = test_sft.build
    test_sft.build = lambda name, implementation: build("gpt_oss", "eager" if size == 0 else attention)
    try:
        return test_sft.fit(size, router_aux_loss_coef=0.7, **changes)
    finally:
        test_sft.build = kept


def fit_here(size: int, options: dict):
    return fit(size, **options)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 2), (4, 1)])
def test_sft_weighs_it_by_its_own_coefficient(worlds, world_size, accumulation):
    groups, options = world_size // 2, {"learning_rate": 0.1, "evaluate": True, "per_device_eval_batch_size": 1}
    expected = fit(0, gradient_accumulation_steps=accumulation * groups, **options)
    options["gradient_accumulation_steps"] = accumulation
    results = worlds(world_size).run(fit_here, 2, options)
    for actual in results:
        assert_same_trajectory(actual, expected, 2e-5)
        for ours, theirs in zip(actual[0][:4], expected[0][:4]):
            assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], rel=1e-5)


# Losses of a user's own


def adds_more_of_it(self, own, model, inputs, count):
    loss, outputs = own(return_outputs=True)
    return loss + 0.3 * outputs.aux_loss


def fit_overridden(size: int, body, **changes):
    reset_state()
    model = build("gpt_oss", "eager" if size == 0 else "ulysses", **ROUTED)
    options = {"model": model, "data_collator": pad_right, "train_dataset": Rows(24)}
    if size:
        options["long_context"] = LongContextConfig(sequence_parallel_size=size)
    base = with_compute_loss(LongContextTrainer if size else Trainer, body)
    settings = {"learning_rate": 0.1, "num_train_epochs": 9, **changes}
    trainer = base(args=arguments(tempfile.mkdtemp(), **settings), **options)
    trainer.train()
    return trainer.state.log_history, weights_of(trainer)


@pytest.mark.parametrize(("world_size", "bodies"), [(2, [logs, scales, adds_more_of_it]), (4, [scales])])
def test_overrides_of_compute_loss_keep_it(worlds, world_size, bodies):
    for body in bodies:
        expected = fit_overridden(0, body, gradient_accumulation_steps=world_size // 2)
        for actual in worlds(world_size).run(fit_overridden, 2, body):
            assert_same_trajectory(actual, expected)


def adds_own_router_loss(outputs, labels, num_items_in_batch=None):
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum", ignore_index=-100
    )
    return losses / num_items_in_batch + 0.7 * outputs.aux_loss


def test_a_loss_function_that_adds_it_on_every_rank_is_refused(world2):
    options = {"trainer_options": {"compute_loss_func": adds_own_router_loss}}
    with pytest.raises(RanksError, match="it must return a sum over tokens"):
        world2.run(plain_here, 2, options)


def plain_here(size: int, options: dict):
    return train(size, model=build("gpt_oss", "ulysses", **ROUTED), **options)


# The commands


def prove(kinds, groups: int, name: str):
    config = getattr(tf, f"{name}Config")(**ROUTED, num_local_experts=8)
    return ModelUnderTest.of(config, "causal-lm", 2), Setting(2, groups, kinds=kinds, dtype="float64")


@pytest.mark.parametrize("groups", [1, 2])
def test_verify_proves_it(worlds, groups):
    tested, setting = prove(KINDS, groups, "Mixtral")
    assert tested.config.output_router_logits
    for result in run_proof(worlds(2 * groups), tested, setting, 100.0):
        assert result.outcome == EXACT, result.message

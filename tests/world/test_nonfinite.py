"""A loss or gradient that is not finite never reaches the weights, and is reported by layer, rank and row on all
ranks."""

from __future__ import annotations

import math
import os
import re

import pytest
import torch
from transformers import TrainerCallback

from ..training import Rows, reset_state, train


class Poison(TrainerCallback):
    """In step 2, on one rank, layer 0's MLP gives NaN or an infinite or huge gradient, from token 2 on in row 1."""

    def __init__(self, how: str, rank: int, times: int = 9) -> None:
        self.how, self.rank, self.times, self.is_on = how, rank, times, False
        self.weights: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.rank == args.process_index:
            model.get_submodule("model.layers.0.mlp").register_forward_hook(self.spoil)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.is_on = state.global_step == 1
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        if self.how == "weight" and self.is_on and self.rank == args.process_index:
            model.get_parameter("model.norm.weight").data[2] = math.nan

    def spoil(self, module, args, output):
        if not self.is_on or not self.times or self.how == "weight":
            return output
        self.times -= 1
        mask = torch.zeros_like(output)
        mask[1, 2:] = math.inf
        if self.how == "forward":
            return output + mask - mask
        if output.requires_grad:
            output.register_hook(
                lambda gradient: gradient * (mask + 1).clamp(max=1e25) if self.how == "huge" else gradient + mask
            )
        return output


def poison(size: int, how: str, policy: str, rank: int = 1, times: int = 9, **options):
    """(error, history, weights, weights before each step, optimizer steps taken)"""
    callback = Poison(how, rank, times)
    steps_taken = []

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            steps_taken.extend({int(values["step"]) for values in optimizer.state.values()})

    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "context": {"on_nonfinite": policy}, **options}
    try:
        result = train(size, trainer_options={"callbacks": [callback, Look()]}, **options)
    except RuntimeError as error:
        return str(error), None, None, callback.weights, steps_taken
    finally:
        reset_state()
    return None, result[0], result[1], callback.weights, steps_taken


def poison_here(arguments, options):
    return poison(*arguments, **options)


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (2, 1), (4, 2)])
def test_nan_in_forward_names_layer_rank_row_and_token_on_every_rank(worlds, world_size, size):
    results = worlds(world_size).run(poison_here, (size, "forward", "raise"), {})
    messages = {result[0] for result in results}
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith("step 2 is not finite: the loss of rank "), message
    # With shared rows, rank 1's tokens begin in the middle, and attention carries them to the others a layer later.
    where = "what comes out of `model.layers.0.mlp` in row 1 of the batch, from token "
    assert f"on rank 1: micro-batch 0, forward, {where}" in message
    token = int(message.split("on rank 1: ")[1].split("from token ")[1].split()[0])
    assert token == 2 if size == 1 else token > 2
    assert "No weight was changed by it: look at these rows, lower `learning_rate`" in message
    assert all(len(result[3]) == 2 for result in results), "somebody began a third step"


def test_infinite_gradient_names_where_backward_and_the_first_parameter(world2):
    for message, *_ in world2.run(poison_here, (1, "backward", "raise"), {}):
        assert "the loss of rank" not in message
        assert "the gradient of `model.embed_tokens.weight` is the first that is not finite" in message
        assert "on rank 1: micro-batch 0, backward, the gradient of what comes out of `model.layers.0.mlp" in message
        assert " in row 1 of the batch, from token 2 on (`input_ids` [" in message


HUGE = (
    r"step 2 is not finite: every gradient is finite, but their norm overflows; "
    r"the largest is \d\S*e\+2\d, in that of `model\.[a-z_0-9.]+weight`\."
)


@pytest.mark.parametrize("size", [1, 2])
def test_a_norm_that_overflows_is_refused_though_every_gradient_is_finite(world2, size):
    messages = {result[0] for result in world2.run(poison_here, (size, "huge", "raise"), {})}
    assert len(messages) == 1 and re.match(HUGE, messages.pop())


def test_a_norm_that_overflows_would_be_a_step_of_nothing():
    """What the trainer of transformers does with it: it counts a step and moves the weights by what came before."""
    plain = {"optim": "sgd", "weight_decay": 0.0}
    assert re.match(HUGE, poison(1, "huge", "raise", rank=0, **plain)[0])
    error, _, _, before, _ = poison(1, "huge", "off", rank=0, **plain)
    assert error is None and torch.equal(before[1], before[2]) and not torch.equal(before[0], before[1])


@pytest.mark.parametrize("how", ["forward", "backward", "huge"])
def test_skipped_step_leaves_weights_and_moments_and_is_counted_in_the_log(world2, how):
    results = world2.run(poison_here, (2, how, "skip"), {"gradient_accumulation_steps": 2, "num_train_epochs": 3})
    for error, history, weights, before, steps_taken in results:
        assert error is None
        assert torch.equal(before[1], before[2]) and not torch.equal(before[0], before[1])
        assert not torch.equal(before[2], before[3])
        assert steps_taken == [3]
        logged = [entry.get("skipped_steps") for entry in history if "loss" in entry]
        assert logged == [None, 1, 1, 1]
        assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    assert all(torch.equal(results[0][2][name], weight) for name, weight in results[1][2].items())


def test_stopping_saves_the_weights_of_before(world2, tmp_path):
    options = {"output_dir": str(tmp_path)}
    for error, _, weights, before, steps_taken in world2.run(poison_here, (2, "forward", "stop"), options):
        assert error is None and len(before) == 2 and steps_taken == [1]
        assert torch.equal(torch.cat([weight.flatten() for weight in weights.values()]), before[1])
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()


def test_a_fault_that_does_not_come_again_is_called_intermittent():
    message = poison(1, "forward", "raise", rank=0, times=1)[0]
    assert "not reproduced by running the same batches again (intermittent)" in message
    assert "the loss of rank 0 is nan in micro-batch 0" in message


def test_ruined_weight_is_named_and_cannot_be_skipped():
    message = poison(1, "weight", "skip", rank=0)[0]
    assert "the weight `model.norm.weight` itself is not finite on rank 0" in message
    assert "No later step can be finite, so `on_nonfinite` ('skip') has nothing to save" in message


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_told_too(reentrant):
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert "forward, what comes out of `model.layers.0.mlp`" in poison(1, "forward", "raise", rank=0, **how)[0]
    backward = poison(1, "backward", "raise", rank=0, **how)[0]
    seen = "on rank 0: micro-batch 0, backward, the gradient of what comes out of `model.layers.0.mlp"
    assert ("re-entrant checkpointing hides its backward" if reentrant else seen) in backward


def train_on_nothing(size, attention):
    rows = Rows()
    rows.rows = [{**row, "labels": [-100] * len(row["labels"])} for row in rows.rows]
    try:
        train(size, rows=rows, attention=attention)
    except RuntimeError as error:
        return str(error)
    finally:
        reset_state()


def test_a_step_without_a_label_says_so(world2):
    for told in [train_on_nothing(1, "packed"), *world2.run(train_on_nothing, 2, "ulysses")]:
        assert "in the loss itself (nan): every label of the step is -100" in told


def test_off_leaves_it_to_the_host():
    error, history, weights, *_ = poison(1, "forward", "off", rank=0)
    assert error is None and any(bool(torch.isnan(weight).any()) for weight in weights.values())


def test_looking_changes_no_number():
    watched, plain = train(1), train(1, context={"on_nonfinite": "off"})
    assert all(torch.equal(watched[1][name], weight) for name, weight in plain[1].items())

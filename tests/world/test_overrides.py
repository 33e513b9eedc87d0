"""What users override in a trainer, or change later, is proven by numbers or refused before the first step."""

from __future__ import annotations

import re
import tempfile

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

from hf_longctx import LongContextConfig, LongContextTrainer, MemoryConfig
from hf_longctx.trainer.mixin import SequenceParallelMixin

from ..models import build
from ..overrides import (
    ADDITIVE,
    EXACT_OVERRIDES,
    MIXING,
    REFUSED_OVERRIDES,
    adds_a_term,
    averages_a_share,
    by_position,
    changes_labels,
    divides_twice,
    drops_the_shard,
    focal,
    scales,
    squares,
    targets_of,
    token_losses,
    with_compute_loss,
)
from ..training import Rows, arguments, assert_same_trajectory, pad_right, reset_state, weights_of


def make(base, size, options=None, **changes):
    """A trainer of class `base` on a tiny model in float64."""
    reset_state()
    model = build("llama", "sdpa" if size == 0 else "ulysses", torch.float64)
    options = {"model": model, "data_collator": pad_right, "train_dataset": Rows(), **(options or {})}
    if size:
        options["long_context"] = LongContextConfig(sequence_parallel_size=size)
    return base(args=arguments(tempfile.mkdtemp(), **changes), **options)


def result_of(trainer):
    trainer.train()
    return trainer.state.log_history, weights_of(trainer)


def outcomes(function, cases, size):
    """What each case returns, or the first line of what it raises."""
    answers = []
    for case in cases:
        try:
            answers.append(function(case, size))
        except (NotImplementedError, RuntimeError, ValueError) as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def compare(world, function, cases, tolerance=2e-6, size=2):
    """Every case trains on shares as in one process; the losses are in fp32, the model in fp64."""
    per_device = 2
    expected = [function(case, 0, per_device * world.size // size) for case in cases]
    for answers in world.run(outcomes, function, cases, size):
        for case, answer, reference in zip(cases, answers, expected):
            assert not isinstance(answer, str), f"{case}: {answer}"
            assert_same_trajectory(answer, reference, tolerance)


def refuse(world, function, cases, messages, size=2):
    for answers in world.run(outcomes, function, cases, size):
        for case, answer, message in zip(cases, answers, messages):
            assert isinstance(answer, str) and re.search(message, answer), f"{case}: {answer}"


def with_function(function, size, batch=2):
    return result_of(
        make(
            LongContextTrainer if size else Trainer,
            size,
            {"compute_loss_func": function},
            per_device_train_batch_size=batch,
        )
    )


def test_losses_that_are_sums_over_tokens_are_exact(world2):
    compare(world2, with_function, ADDITIVE)


def test_losses_that_mix_tokens_are_refused(world2):
    refuse(world2, with_function, MIXING, ["it is no sum over tokens: a weight by position"] * len(MIXING))


def with_override(body, size, batch=2):
    base = with_compute_loss(LongContextTrainer if size else Trainer, body)
    return result_of(make(base, size, per_device_train_batch_size=batch))


def test_overrides_of_compute_loss_that_add_up_are_exact(world2):
    compare(world2, with_override, EXACT_OVERRIDES)


def test_overrides_of_compute_loss_add_up_over_groups_too(world4):
    compare(world4, with_override, EXACT_OVERRIDES[1:5])


def per_group(body, size, batch=2):
    base = with_compute_loss(LongContextTrainer if size else Trainer, body)
    return result_of(make(base, size, per_device_train_batch_size=batch, average_tokens_across_devices=False))


def test_overrides_without_the_average_over_devices(world2):
    compare(world2, per_group, [scales, adds_a_term, divides_twice])


def test_overrides_of_compute_loss_that_do_not_are_refused(world2):
    refuse(world2, with_override, list(REFUSED_OVERRIDES), REFUSED_OVERRIDES.values())


# What is changed later


def built(size, options=None, base=None, **changes):
    return make(base or (LongContextTrainer if size else Trainer), size, options, **changes)


def sets_the_function(trainer):
    trainer.compute_loss_func = focal


def sets_label_smoothing(trainer):
    trainer.label_smoother = LabelSmoother(epsilon=0.2)


def sets_compute_loss(trainer):
    own = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: 0.5 * own(*args, **kwargs)


def sets_another_model(trainer):
    name = trainer.model.config._attn_implementation
    trainer.model = build("llama", name, torch.float64, seed=1)
    if type(trainer) is Trainer:  # it would train the old one, with an optimizer of the new one
        trainer.model_wrapped = trainer.model


def sets_another_collator(trainer):
    trainer.data_collator = every_label


def every_label(rows):
    batch = pad_right(rows)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def sets_checkpointing(trainer):
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})


def sets_arguments(trainer):
    trainer.args.average_tokens_across_devices = False


def sets_attention_again(trainer):
    name = trainer.model.config._attn_implementation
    trainer.model.set_attn_implementation("eager")
    trainer.model.set_attn_implementation(name)


def patches_a_module(trainer):
    mlp = trainer.model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: 2 * own(x)


EXACT_CHANGES = [
    sets_the_function,
    sets_label_smoothing,
    sets_compute_loss,
    sets_another_model,
    sets_another_collator,
    sets_checkpointing,
    sets_arguments,
    sets_attention_again,
    patches_a_module,
]


def changed_before(change, size, batch=2):
    trainer = built(size, per_device_train_batch_size=batch)
    change(trainer)
    return result_of(trainer)


def test_what_is_changed_before_train_is_exact(world2):
    compare(world2, changed_before, EXACT_CHANGES)


def changed_between(change, size, batch=2):
    trainer = built(size, per_device_train_batch_size=batch, max_steps=1)
    trainer.train()
    change(trainer)
    trainer.args.max_steps = 4
    return result_of(trainer)


def test_what_is_changed_between_two_runs_is_exact(world2):
    compare(world2, changed_between, [sets_the_function, sets_label_smoothing, sets_compute_loss])


def from_model_init(attention, size, batch=2):
    options = {"model": None, "model_init": lambda: build("bart", attention if size else "sdpa", torch.float64)}
    return result_of(built(size, options, per_device_train_batch_size=batch, average_tokens_across_devices=True))


def sets_plain_attention(trainer):
    trainer.model.set_attn_implementation("sdpa")


def sets_plain_attention_of_the_configuration(trainer):
    trainer.model.config._attn_implementation = "sdpa"


def sets_a_mixing_function(trainer):
    trainer.compute_loss_func = by_position


def sets_a_mixing_compute_loss(trainer):
    own = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: own(*args, **kwargs) ** 2


def sets_a_plain_model(trainer):
    trainer.model = build("llama", "sdpa", torch.float64)


def sets_a_model_of_another_class(trainer):
    trainer.model = build("modernbert", "ulysses", torch.float64)


def sets_a_step(trainer):
    trainer.training_step = lambda model, inputs, count=None: model(**inputs).loss.detach()


def hides_a_layer(trainer):
    layer = trainer.model.model.layers[1].self_attn
    own = layer.forward
    layer.forward = lambda *args, sequence_shard=None, **kwargs: own(*args, **kwargs)


REFUSED_CHANGES = {
    sets_plain_attention: "attn_implementation='sdpa', which would see only this rank's tokens",
    sets_plain_attention_of_the_configuration: "attn_implementation='sdpa', which would see only",
    sets_a_mixing_function: "it is no sum over tokens",
    sets_a_mixing_compute_loss: "its means are local",
    sets_a_plain_model: "attn_implementation='sdpa', which would see only",
    sets_a_model_of_another_class: "is a `ModernBertForMaskedLM` now.*build a new trainer",
    sets_a_step: "RuntimeError: no batch of step 1|cannot be proven on shares|not bound",
    hides_a_layer: "gives other outputs when its rows are sharded",
}


def test_what_is_changed_before_train_and_not_exact_is_refused(world2):
    refuse(world2, changed_before, list(REFUSED_CHANGES), REFUSED_CHANGES.values())


def evaluated_after(change, size):
    trainer = built(size, {"eval_dataset": Rows(5)})
    change(trainer)
    return trainer.evaluate()["eval_loss"]


def predicted_after(change, size):
    trainer = built(size, prediction_loss_only=True)
    change(trainer)
    return trainer.predict(Rows(5)).metrics["test_loss"]


@pytest.mark.parametrize("function", [evaluated_after, predicted_after])
def test_what_is_changed_before_evaluation(world2, function):
    refused = [change for change in REFUSED_CHANGES if change not in (sets_a_step, hides_a_layer)]
    refuse(world2, function, refused, [REFUSED_CHANGES[change] for change in refused])
    for change in (sets_the_function, sets_another_model, sets_another_collator):
        expected = function(change, 1)
        for answer in world2.run(outcomes, function, [change], 2):
            assert answer[0] == pytest.approx(expected, rel=1e-6), change


class Changes(TrainerCallback):
    """Changes a trainer while it runs."""

    def __init__(self, change, event):
        self.change, self.event = change, event

    def on_train_begin(self, *args, **kwargs):
        if self.event == "begin":
            self.change(self.trainer)

    def on_step_end(self, *args, **kwargs):
        if self.event == "step":
            self.change(self.trainer)


def changed_during(case, size, batch=2):
    change, event = case
    callback = Changes(change, event)
    callback.trainer = built(size, {"callbacks": [callback]}, per_device_train_batch_size=batch)
    return result_of(callback.trainer)


def test_what_is_changed_during_a_run_is_refused(world2):
    changes = [sets_plain_attention, sets_plain_attention_of_the_configuration, sets_the_function, sets_compute_loss]
    cases = [(change, event) for change in changes for event in ("begin", "step")]
    refuse(world2, changed_during, cases, ["was changed to .* after this run had started"] * len(cases))


def test_a_model_from_model_init_is_prepared_each_time(world2):
    compare(world2, from_model_init, ["ulysses"])


# Other methods


class PlainLoader:
    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=2, collate_fn=pad_right))

    def get_eval_dataloader(self, eval_dataset=None):
        return self.accelerator.prepare(DataLoader(Rows(4), batch_size=2, collate_fn=pad_right))


class OwnLoader:
    def get_train_dataloader(self):
        self.train_dataset = Rows(12)
        return super().get_train_dataloader()


class OwnStep:
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class ScaledStep:
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen = [*getattr(self, "seen", []), float(loss)]
        return loss


class LossInTheStep:
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class SquaredStep:
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch) ** 2
        self.accelerator.backward(loss)
        return loss.detach()


class LabelsInTheStep:
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] % 2 == 0, -100)
        return super().training_step(model, inputs, num_items_in_batch)


class BatchOfItsOwn:
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
        self.accelerator.backward(loss)
        return loss.detach()


class NoShard:
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return {name: value for name, value in inputs.items() if name != "sequence_shard"}


class OtherCount:
    def _get_num_items_in_batch(self, batch_samples, device):
        return sum(batch["labels"].ne(-100).sum() for batch in batch_samples)


class KeepsTheCount:
    def _get_num_items_in_batch(self, batch_samples, device):
        self.count = super()._get_num_items_in_batch(batch_samples, device)
        return self.count


def with_mixin(mixin, size, batch=2):
    base = type(mixin.__name__ + "Trainer", (mixin, LongContextTrainer if size else Trainer), {})
    return result_of(built(size, base=base, per_device_train_batch_size=batch))


def between(mixin, size, batch=2):
    """The mixin between ours and the library's."""
    base = type(mixin.__name__ + "Trainer", (SequenceParallelMixin, mixin, Trainer) if size else (mixin, Trainer), {})
    return result_of(built(size, base=base, per_device_train_batch_size=batch))


def test_overridden_methods_that_call_ours_are_exact(world2):
    compare(world2, with_mixin, [OwnLoader, OwnStep, ScaledStep, KeepsTheCount])


def test_overridden_methods_that_do_not_are_refused(world2):
    cases = {
        PlainLoader: "ValueError: a batch carries no `sequence_shard`.*get_train_dataloader",
        LossInTheStep: "`training_step` of `LossInTheStepTrainer` cannot be proven on shares: it runs the model",
        SquaredStep: "cannot be proven on shares: what goes backward is not what `compute_loss` gives",
        LabelsInTheStep: "it changes `labels`, which were made targets",
        BatchOfItsOwn: "RuntimeError: no batch of step 1 went through `_prepare_inputs` of `BatchOfItsOwnTrainer`",
        NoShard: "does not give the model all of `inputs`|without its `sequence_shard`|`compute_loss`",
        OtherCount: "`compute_loss` of `OtherCountTrainer` is ",
    }
    refuse(world2, with_mixin, list(cases), cases.values())


class HalvedLoss:
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) / 2


class SquaredLoss:
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) ** 2


def test_overrides_between_our_mixin_and_the_trainer_are_seen(world2):
    compare(world2, between, [HalvedLoss, ScaledStep])
    refuse(world2, between, [SquaredLoss], ["its means are local"])


class LogsPrediction:
    def prediction_step(self, *args, **kwargs):
        self.seen = super().prediction_step(*args, **kwargs)
        return self.seen


class ScalesPrediction:
    def prediction_step(self, *args, **kwargs):
        loss, *rest = super().prediction_step(*args, **kwargs)
        return 2 * loss, *rest


class OwnPrediction:
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return model(**inputs).loss, None, None


def evaluated_with(mixin, size):
    base = type(mixin.__name__ + "Trainer", (mixin, LongContextTrainer), {})
    return built(size, {"eval_dataset": Rows(5)}, base).evaluate()["eval_loss"]


def evaluated_in_training(mixin, size):
    base = type(mixin.__name__ + "Trainer", (mixin, LongContextTrainer), {})
    return result_of(built(size, {"eval_dataset": Rows(5)}, base, eval_strategy="steps", eval_steps=1))


def test_overridden_evaluation(world2):
    refuse(
        world2,
        evaluated_with,
        [ScalesPrediction, OwnPrediction, PlainLoader],
        ["its loss is not the one that", "without `compute_loss`", "carries no `sequence_shard`"],
    )
    refuse(world2, evaluated_in_training, [ScalesPrediction], ["its loss is not the one that"])
    expected = evaluated_with(LogsPrediction, 1)
    for answer in world2.run(outcomes, evaluated_with, [LogsPrediction], 2):
        assert answer[0] == pytest.approx(expected, rel=1e-6)


class SelfModel:
    """Runs the bare model, so that the wrapper averages nothing."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(self.model, inputs, return_outputs, num_items_in_batch)


def mixes_tokens_later(trainer):
    mlp = trainer.model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + 0.1 * x.cumsum(dim=1)


def sets_the_config_of_the_trainer(trainer):
    trainer.long_context = LongContextConfig(sequence_parallel_size=1)


def sets_liger(trainer):
    trainer.args.torch_compile = True


def hides_a_layer_at_step_two(trainer):
    if trainer.state.global_step == 1:
        hides_a_layer(trainer)


def test_what_else_is_changed_later_is_refused(world2):
    changes = {
        mixes_tokens_later: "gives other outputs when its rows are sharded",
        sets_the_config_of_the_trainer: "`long_context` was replaced after the trainer was built",
        sets_liger: "`torch_compile` .True. cannot be used",
    }
    refuse(world2, changed_before, list(changes), changes.values())
    refuse(
        world2,
        changed_during,
        [(hides_a_layer_at_step_two, "step")],
        ["1 of 2 attention layers .first: `model.layers.1.self_attn`. did not read"],
    )
    refuse(world2, with_mixin, [SelfModel], ["not run the wrapped model.*call `model"])
    refuse(world2, evaluated_after, [hides_a_layer], ["gives other outputs when its rows are sharded"])


# One process


def with_plain_attention(case, size):
    function, attention = case
    model = build("llama", attention, torch.float64)
    if isinstance(function, type):
        base = type("Own", (function, LongContextTrainer if size else Trainer), {})
        return result_of(built(size, {"model": model}, base))
    if function in MIXING:
        return result_of(built(size, {"model": model, "compute_loss_func": function}))
    return result_of(
        built(size, {"model": model}, with_compute_loss(LongContextTrainer if size else Trainer, function))
    )


ALONE = [averages_a_share, squares, drops_the_shard, SquaredStep, LossInTheStep, PlainLoader, by_position]


@pytest.mark.parametrize("attention", ["ulysses", "packed"])
@pytest.mark.parametrize("function", ALONE)
def test_on_one_process_any_loss_is_the_stock_trainers(function, attention):
    ours = with_plain_attention((function, attention), 1)
    assert_same_trajectory(ours, with_plain_attention((function, "sdpa"), 0), 2e-6)


@pytest.mark.parametrize("function", [changes_labels, LabelsInTheStep])
def test_labels_that_change_after_they_were_made_targets_are_refused_on_one_process_too(function):
    with pytest.raises(NotImplementedError, match="`labels`"):
        with_plain_attention((function, "packed"), 1)


def tiled_and_changed(change, size, batch=2):
    options = {"memory": MemoryConfig(loss_tile_size=3)} if size else {}
    trainer = built(size, options, per_device_train_batch_size=batch)
    change(trainer)
    return result_of(trainer)


def test_a_tiled_loss_is_put_on_again(world2):
    compare(world2, tiled_and_changed, [sets_another_model, sets_compute_loss, patches_a_module])


# Keys of the user's own


def with_weights(rows):
    batch = pad_right(rows)
    batch["token_weights"] = 0.5 + batch["input_ids"] % 5 / 5
    return batch


class Weighted:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights, targets = inputs.pop("token_weights"), targets_of(inputs)
        losses = token_losses(model(**inputs).logits, targets)
        return (losses * weights).sum() / num_items_in_batch * self.accelerator.num_processes


class NeedsLongRows:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert inputs["input_ids"].shape[1] > 9, "rows are short"
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def weighted(mixin, size, batch=2):
    base = type("Own", (mixin, LongContextTrainer if size else Trainer), {})
    return result_of(built(size, {"data_collator": with_weights}, base, per_device_train_batch_size=batch))


def test_keys_of_the_users_own_are_in_the_tiny_rows(world2):
    compare(world2, weighted, [Weighted])
    refuse(
        world2, with_mixin, [NeedsLongRows], ["failed on whole tiny rows .AssertionError: rows are short., so it can"]
    )

"""Training of models with fast weights (TTT-E2E): checks, logs, and the warm-up of the inner learning rate.

There is no arithmetic here: a TTT model's `forward` is the loss, so any trainer trains it.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from ..adapters.wrapped import unwrap
from ..config.run import LongContextConfig
from ..config.values import is_number
from ..data.packing.collator import fills_rows
from ..ttt.fast_model import TTTForCausalLM
from .mixin import SequenceParallelMixin


logger = logging.get_logger(__name__)
_EPOCH_LOGS = 10  # steps between two measured ones where logs come once an epoch
_LOGGED = ("inner_grad_norm", "inner_step_norm", "inner_gain")


class InnerLearningRateWarmup(TrainerCallback):
    """Raise the learning rate of the inner steps from a part of itself to the whole, as the paper does in pretraining.

    Args:
        start (`float`, *optional*, defaults to 0.1): the part that the first step has, from 0 to 1.
        ratio (`float`, *optional*, defaults to 0.1): part of the run's steps after which it is whole, from 0 to 1.

    It depends on the number of the step alone, so a run that is resumed goes on where it was. Evaluations between
    steps read at the whole rate, as a checkpoint of that step does when it is loaded.
    """

    def __init__(self, start: float = 0.1, ratio: float = 0.1) -> None:
        for name, value in (("start", start), ("ratio", ratio)):
            if not (is_number(value) and 0 <= value <= 1):
                raise ValueError(f"`{name}` ({value!r}) of `InnerLearningRateWarmup` must be a number from 0 to 1.")
        self.start, self.ratio = start, ratio

    def factor(self, step: int, max_steps: int) -> float:
        """The part of the learning rate in the step after `step` finished ones."""
        warm = self.ratio * max_steps
        return 1.0 if step >= warm else self.start + (1 - self.start) * step / warm

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not has_fast_weights(model):
            raise ValueError(
                f"`InnerLearningRateWarmup` is among the callbacks, but `{type(unwrap(model)).__name__}` takes no "
                "inner steps: build the model with `TTTForCausalLM.from_base(...)`, or leave the callback out."
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model = unwrap(model)
        model.inner_learning_rate = model.settings.inner_learning_rate * self.factor(
            state.global_step, state.max_steps
        )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model = unwrap(model)
        model.inner_learning_rate = model.settings.inner_learning_rate

    on_train_end = on_step_end


class InnerStepMixin(SequenceParallelMixin):
    """In front of a library's trainer class, like the mixins below; does nothing for a model without fast weights.

    Logs `inner_grad_norm` and `inner_step_norm`, means over rows and chunks, and `inner_gain`: how much lower the loss
    of a chunk is for the step before it, measured in the steps that are logged; `loss` is the outer loss. Where logs
    come once an epoch, it is measured in the first step of each and in every tenth, and in a run that ends before its
    first log, in the last step, for the summary.

    Args:
        args, kwargs: see [`SequenceParallelMixin`].
    """

    def prepare_arguments(self, given: dict[str, Any]) -> None:
        model = given.get("model")
        if has_fast_weights(model):
            refuse_shared(model, self.long_context)
            _refuse_arguments(given.get("args"), self.memory)
        super().prepare_arguments(given)

    def check_model(self) -> None:
        if has_fast_weights(self.model):
            refuse_shared(self.model, self.long_context)
            _refuse_built(self)
            _warn_of_lost_start(self.model)
        super().check_model()

    _logged_steps = False
    _measured_step: int | None = None  # the first one since the last log

    def _inner_training_loop(self, *args, **kwargs):
        library: Any = super()
        self._logged_steps, self._measured_step = False, None
        if has_fast_weights(self.model):
            unwrap(self.model).step_record.clear()
        try:
            return library._inner_training_loop(*args, **kwargs)
        finally:  # a run that is interrupted leaves no rate of its warm-up behind
            if has_fast_weights(self.model):
                unwrap(self.model).inner_learning_rate = unwrap(self.model).settings.inner_learning_rate

    def _prepare_inputs(self, inputs):
        library: Any = super()
        inputs = library._prepare_inputs(inputs)
        if has_fast_weights(self.model):
            unwrap(self.model).measures_gain = not self._is_evaluating and self._measures_next()
        return inputs

    def _measures_next(self) -> bool:
        library: Any = self
        state, args = library.state, library.args
        step = state.global_step + 1
        if self._measured_step is None:
            self._measured_step = step
        if args.logging_strategy == "epoch":
            return step % _EPOCH_LOGS == 0 or step == self._measured_step
        if args.logging_strategy == "no":
            return False
        logs = step % state.logging_steps == 0 or (args.logging_first_step and step == 1)
        return logs or (step == state.max_steps and not self._logged_steps)

    def log(self, logs, *args, **kwargs):
        # A run that is over before its first log says it in its summary.
        is_summary = "train_loss" in logs and not self._logged_steps
        if has_fast_weights(self.model) and ("loss" in logs or is_summary):
            self._logged_steps, self._measured_step = True, None
            record = unwrap(self.model).step_record
            rate = record.learning_rate
            sums = self.accelerator.reduce(record.take(self.args.device), "sum")
            logs.update({name: total / count for name, (total, count) in zip(_LOGGED, sums.tolist()) if count})
            if rate is not None:
                logs["inner_learning_rate"] = rate
        library: Any = super()
        return library.log(logs, *args, **kwargs)


def has_fast_weights(model: Any) -> bool:
    """Whether the transformers model inside is a [`TTTForCausalLM`]."""
    return model is not None and not isinstance(model, str) and isinstance(unwrap(model), TTTForCausalLM)


def refuse_shared(model: Any, config: LongContextConfig) -> None:
    """Raise `NotImplementedError` where several processes would share a row."""
    size = config.sequence_parallel_size
    if size > 1:
        raise NotImplementedError(
            f"`{type(unwrap(model)).__name__}` reads the chunks of a row one after the other, so its rows cannot be "
            f"shared, with `sequence_parallel_size` ({size}): set it to 1 and use data parallelism."
        )


def _refuse_arguments(args: Any, memory: Any) -> None:
    tiled = next((name for name in ("loss_tile_size", "mlp_tile_size") if getattr(memory, name) is not None), None)
    name = "memory" if memory.memory != "off" else tiled
    if name is not None:
        raise NotImplementedError(
            f"`{name}` ({getattr(memory, name)!r}) tiles losses or MLPs, whose backward cannot be differentiated "
            "again in layers with fast weights: leave it out and set `gradient_checkpointing=True`; layers before the "
            "suffix can be tiled by hand."
        )
    reasons = {
        "deepspeed": "it gathers weights while a layer runs; use DDP, or FSDP2 with the model as one unit",
        "torch_compile": "the inner gradient is not traced; leave it off",
        "use_liger_kernel": "it replaces layers by ones whose backward cannot be differentiated again; leave it off",
        "packing": "fast weights would pass from one document into the next; give one document a row",
        "padding_free": "fast weights would pass from one document into the next; give one document a row",
    }
    for name, reason in reasons.items():
        if getattr(args, name, None):
            raise NotImplementedError(f"`{name}` ({getattr(args, name)!r}) cannot train fast weights: {reason}.")


def _warn_of_lost_start(model: Any) -> None:
    """Say that an adapter alone could not be loaded again: what fast weights start from is random and not in it."""
    mlps = unwrap(model).primes.prime_layers
    is_frozen = not any(parameter.requires_grad for parameter in unwrap(model).primes.parameters())
    if hasattr(model, "peft_config") and is_frozen and not any(bool(mlp.prime_down.any()) for mlp in mlps):
        logger.warning(
            "the prime MLPs are new and frozen, and the adapter does not hold them, so it fits no other model: set "
            "`modules_to_save=['primes']`, or save the model itself before it is adapted."
        )


def _refuse_built(trainer: Any) -> None:
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            "DeepSpeed is configured for a model with fast weights, and it gathers weights while a layer runs: use "
            "DDP, or FSDP2 with the whole model as one unit."
        )
    if fills_rows(trainer.data_collator) or getattr(trainer.data_collator, "padding_free", False):
        raise NotImplementedError(
            f"`data_collator` ({type(trainer.data_collator).__name__}) packs documents, and fast weights would pass "
            "from one document into the next: give one document a row."
        )

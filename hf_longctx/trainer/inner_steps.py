"""Training of models with fast weights (TTT-E2E): logs of their inner steps, and when their checks run.

There is no arithmetic here: a TTT model's `forward` is the loss, so any trainer trains it.
"""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from ..adapters.wrapped import unwrap
from .inner_checks import check_given, has_fast_weights, refuse_built
from .inner_warmup import InnerLearningRateWarmup
from .mixin import SequenceParallelMixin


logger = logging.get_logger(__name__)
_EPOCH_LOGS = 10  # steps between two measured ones where logs come once an epoch
_LOGGED = ("inner_grad_norm", "inner_step_norm", "inner_gain")


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
        check_given(given, self.long_context, self.memory)
        super().prepare_arguments(given)

    def check_model(self) -> None:
        if has_fast_weights(self.model):
            refuse_built(self)
            self._record_settings()
            _warn_of_lost_start(self.model)
        super().check_model()

    def _record_settings(self) -> None:
        """Let checkpoints say with which settings and warm-up they were trained, also those of adapters alone."""
        if not any(isinstance(callback, InnerLearningRateWarmup) for callback in self.callback_handler.callbacks):
            self.add_callback(InnerLearningRateWarmup(start=1.0, ratio=0.0))

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


def _warn_of_lost_start(model: Any) -> None:
    """Say that an adapter alone could not be loaded again: what fast weights start from is random and not in it."""
    mlps = unwrap(model).primes.prime_layers
    is_frozen = not any(parameter.requires_grad for parameter in unwrap(model).primes.parameters())
    if hasattr(model, "peft_config") and is_frozen and not any(bool(mlp.prime_down.any()) for mlp in mlps):
        logger.warning(
            "the prime MLPs are new and frozen, and the adapter does not hold them, so it fits no other model: set "
            "`modules_to_save=['primes']`, or save the model itself before it is adapted."
        )

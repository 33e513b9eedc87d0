"""The trainers' overridden methods for models that sleep: the model's forward becomes one over windows while it runs.

The forward is put on the instance for a training or an evaluation and taken off behind it, so losses, counts, DDP,
accumulation and checkpoints stay the library's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..adapters.instance_forward import put_on, take_off
from ..adapters.wrapped import unwrap
from ..config.sleep import SleepConfig
from ..sleep.loss import SleepingForward
from ..sleep.sleepers import check_sleeper, recurrent_parameters
from .mixin import SequenceParallelMixin
from .sleep_checks import refuse_sleep_settings


class SleepMixin(SequenceParallelMixin):
    """In front of a library's trainer class, like the mixins below; does nothing without `SleepConfig(window=...)`.

    Args:
        sleep ([`SleepConfig`], *optional*): how a hybrid thinks over the windows that it forgets.
        kwargs: see [`SequenceParallelMixin`].
    """

    sleep: SleepConfig
    state: Any
    _signature_columns: list[str]
    _sleeping: SleepingForward | None = None
    _frozen: dict[int, torch.nn.Parameter] | None = None

    def prepare_model(self) -> None:
        if self.sleep.window is not None:
            refuse_sleep_settings(self)
            check_sleeper(self.model, self.sleep)
        super().prepare_model()

    def _set_signature_columns_if_needed(self) -> None:
        library: Any = super()
        library._set_signature_columns_if_needed()
        if self.sleep.window is not None and "sleep_windows" not in self._signature_columns:
            self._signature_columns += ["sleep_windows"]  # else the library drops it without a word

    def _inner_training_loop(self, *args, **kwargs):
        library: Any = super()
        with self._asleep(trains=True):
            return library._inner_training_loop(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        library: Any = super()
        with self._asleep():
            return library.evaluation_loop(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._sleeping is not None:
            self._enter_step(self.state.global_step)
        library: Any = super()
        return library.get_batch_samples(epoch_iterator, num_batches, device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._sleeping is not None:
            self._sleeping.keeps_logits = not prediction_loss_only
            if inputs.get("labels") is None:  # the forward of the model would answer, wide awake
                raise ValueError(
                    "rows without `labels` do not say which of their windows are answers, so they cannot be read with "
                    "`sleep`: label them, or use `generate` with `custom_generate=sleep_generate`."
                )
        library: Any = super()
        return library.prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def training_step(self, *args, **kwargs):
        if self._sleeping is not None:
            self._sleeping.keeps_logits = False
        library: Any = super()
        return library.training_step(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if self._sleeping is not None and "loss" in logs:
            logs |= {"sleep_passes": self._sleeping.config.passes, "sleep_peak_keys": self._sleeping.peak_keys}
            self._sleeping.peak_keys = 0
        library: Any = super()
        return library.log(logs, *args, **kwargs)

    @contextlib.contextmanager
    def _asleep(self, trains: bool = False) -> Iterator[None]:
        """A block in which the model's forward reads windows; one inside another changes nothing."""
        if self.sleep.window is None or self._sleeping is not None:
            yield
            return
        model = unwrap(self.model)
        # A trainer that has not trained evaluates what it was given, behind any warm-up.
        now = self.sleep.at(self.state.global_step) if trains or self.state.global_step else None
        self._sleeping = SleepingForward(now or replace(self.sleep, warmup=None))
        put_on(model, self._sleeping)
        try:
            yield
        finally:
            self._thaw()
            take_off(model, SleepingForward.name)
            self._sleeping = None

    def _enter_step(self, step: int) -> None:
        """Choose the passes, the eviction and the trained parameters of the step after `step` finished ones."""
        assert self._sleeping is not None
        self._sleeping.config = self.sleep.at(step)
        if not self.sleep.trains_recurrent_only(step):
            self._thaw()
        elif self._frozen is None:
            kept = {id(parameter) for parameter in recurrent_parameters(unwrap(self.model))}
            self._frozen = {
                id(parameter): parameter
                for parameter in self.model.parameters()
                if parameter.requires_grad and id(parameter) not in kept
            }
            for parameter in self._frozen.values():
                parameter.requires_grad_(False)

    def _thaw(self) -> None:
        for parameter in (self._frozen or {}).values():
            parameter.requires_grad_(True)
        self._frozen = None

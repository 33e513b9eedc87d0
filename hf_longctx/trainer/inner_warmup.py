"""The warm-up of the inner learning rate, and what a resumed run must have in common with its checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..adapters.wrapped import unwrap
from ..config.values import is_number
from .inner_checks import has_fast_weights, refuse_packing


_WARMUP = "_hf_longctx_inner_warmup"  # in `vars(state)`


class InnerLearningRateWarmup(TrainerCallback, ExportableState):
    """Raise the learning rate of the inner steps from a part of itself to the whole, as the paper does in pretraining.

    Args:
        start (`float`, *optional*, defaults to 0.1): the part that the first step has, from 0 to 1.
        ratio (`float`, *optional*, defaults to 0.1): part of the run's steps after which it is whole, from 0 to 1. The
            last step is whole in any case.

    It depends on the number of the step alone, so a run that is resumed goes on where it was; one that would go on
    otherwise is refused. Evaluations between steps read at the whole rate, as a checkpoint of that step does when it
    is loaded.
    """

    def __init__(self, start: float = 0.1, ratio: float = 0.1) -> None:
        for name, value in (("start", start), ("ratio", ratio)):
            if not (is_number(value) and 0 <= value <= 1):
                raise ValueError(f"`{name}` ({value!r}) of `InnerLearningRateWarmup` must be a number from 0 to 1.")
        self.start, self.ratio = start, ratio
        self.settings: dict[str, Any] = {}  # of the model that is trained

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"args": {"start": self.start, "ratio": self.ratio}, "attributes": {"settings": self.settings}}

    def factor(self, step: int, max_steps: int) -> float:
        """The part of the learning rate in the step after `step` finished ones."""
        warm = min(self.ratio * max_steps, max_steps - 1)
        return 1.0 if step >= warm else self.start + (1 - self.start) * step / warm

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not has_fast_weights(model):
            raise ValueError(
                f"`InnerLearningRateWarmup` is among the callbacks, but `{type(unwrap(model)).__name__}` takes no "
                "inner steps: build the model with `TTTForCausalLM.from_base(...)`, or leave the callback out."
            )
        refuse_packing(args)
        if getattr(state, _WARMUP, self) is not self:
            raise ValueError(
                "there are two `InnerLearningRateWarmup` among the callbacks, and the later one alone would count: "
                "leave one out."
            )
        setattr(state, _WARMUP, self)  # a run has a state of its own
        self.settings = dict(unwrap(model).primes.facts)
        if state.global_step > 0:
            self._compare_with_checkpoint(state)

    def _compare_with_checkpoint(self, state) -> None:
        """Raise `ValueError` where the run that is resumed had other settings, or has another warm-up before it."""
        none: dict[str, Any] = {"args": {"start": 1.0, "ratio": 0.0}, "attributes": {}}
        saved = state.stateful_callbacks.setdefault(type(self).__name__, none)
        settings = saved["attributes"].get("settings") or self.settings
        others = [name for name, value in self.settings.items() if settings.get(name) != value]
        if others:
            there = ", ".join(f"`{name}` {settings.get(name)!r}" for name in others)
            here = ", ".join(f"`{name}` {self.settings[name]!r}" for name in others)
            raise ValueError(
                f"the checkpoint was trained with {there}, but the model of this run has {here}: resume with the "
                "checkpoint's settings, or start anew."
            )
        start, ratio = saved["args"]["start"], saved["args"]["ratio"]
        before, steps = InnerLearningRateWarmup(start, ratio), state.max_steps
        if any(before.factor(step, steps) != self.factor(step, steps) for step in range(state.global_step, steps)):
            raise ValueError(
                f"the checkpoint's run warms up with `start` {start} and `ratio` {ratio} (1.0 and 0.0 are none), "
                f"but this one with {self.start} and {self.ratio}: resume with the same `InnerLearningRateWarmup`, or "
                "start anew."
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

"""`CheckpointAdvisor`: how often to save, from what saving and a step take here and how often such a run fails.

Price: clock reads.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

from ..config.values import validate_positive
from ..planner.checkpoint_interval import checkpoint_interval, expected_hours_between_failures
from .watch import Watch


logger = logging.getLogger(__name__)

_STEPS = 101  # the last ones count
_FAR = 2.0  # times the advice


class CheckpointAdvisor(Watch):
    """Measure saves and steps, and say after each save in how many steps the next one is due.

    The logs get `save_seconds` and `advised_save_steps`; the first save logs a sentence, and a warning where
    `save_steps` is twice as often or twice as rare as advised.

    Args:
        hours_between_failures (`float`, *optional*):
            Of the whole run, on average. Unset: by BLOOM's 43,008 device-hours from one failure to the next.
        clock (`Callable`, *optional*): seconds, in place of a CPU's clock.

    Raises:
        ValueError: `hours_between_failures` is not a finite number above 0.

    Communication: none; the first process measures for all.
    """

    def __init__(
        self, *, hours_between_failures: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if hours_between_failures is not None:
            validate_positive("hours_between_failures", hours_between_failures, "hours of the whole run")
        self.hours_between_failures, self._clock = hours_between_failures, clock
        self._begin()

    def _begin(self) -> None:
        self.step_seconds: list[float] = []
        self.save_seconds: list[float] = []
        self._advised: int | None = None
        self._has_warned = False
        self._mark = self._clock()

    def settings(self) -> dict[str, object]:
        return {"hours_between_failures": self.hours_between_failures}

    def figures(self) -> dict[str, float]:
        if self._advised is None:
            return {}
        seconds = statistics.median(self.save_seconds)
        return {"save_seconds": float(f"{seconds:.4g}"), "advised_save_steps": self._advised}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._begin()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = self._clock()
        self.step_seconds = [*self.step_seconds, now - self._mark][-_STEPS:]
        self._mark = now

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._mark = self._clock()

    def on_save(self, args, state, control, **kwargs) -> None:
        now = self._clock()
        self.save_seconds = [*self.save_seconds, now - self._mark][-_STEPS:]
        self._mark = now
        self._advise(args, state)

    def _advise(self, args: Any, state: Any) -> None:
        save = statistics.median(self.save_seconds)
        step = statistics.median(self.step_seconds) if self.step_seconds else 0.0
        if save <= 0 or step <= 0:
            return
        hours = self.hours_between_failures or expected_hours_between_failures(args.world_size)
        seconds = checkpoint_interval(save, hours)
        first, self._advised = self._advised is None, max(1, round(seconds / step))
        if not state.is_world_process_zero:
            return
        advice = (
            f"a checkpoint takes {save:.3g} s and a step {step:.3g} s; with a failure every {hours:,.3g} hours, "
            f"saving every {self._advised:,} steps ({seconds / 60:,.1f} minutes) loses least"
        )
        far = 0.0
        if args.save_strategy == "steps" and state.save_steps:
            far = max(state.save_steps / self._advised, self._advised / state.save_steps)
        if far > _FAR and not self._has_warned:
            self._has_warned = True
            logger.warning(f"`save_steps` ({state.save_steps:,}) is {far:.3g} times off: {advice}")
        elif first:
            logger.info(advice)

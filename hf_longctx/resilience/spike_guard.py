"""`LossSpikeGuard`: a step whose loss or gradient norm jumps is seen before the optimizer takes it, on all ranks.

A spike that the optimizer takes ruins its moments, and costs hours of training until they are forgotten. Ranks that
decide by numbers of their own skip different steps and drift apart; so the numbers of all ranks are gathered first.
Price: one all-gather of 16 bytes a rank and one wait for the device a step, and two medians.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import ExportableState

from ..config.values import validate_choice, validate_count, validate_positive
from ..config.watches import SPIKE_ACTIONS
from .spike_window import is_spike, spike_threshold
from .watch import Watch, watches_of


class LossSpikeGuard(Watch, ExportableState):
    """Act on steps whose loss or gradient norm is above the median of the steps before by many median deviations.

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            `"warn"` says so. `"skip"`: the optimizer does not take the step; it, the schedule and fp16's scale stay as
            they are, and the rows are noted. `"rollback"`: besides, weights, optimizer and schedule are those of the
            run's last checkpoint again, and the data goes on behind the step, so the rows since then are left out.
            `"stop"`: the step is not taken, and the run saves and ends.
        window (`int`, *optional*, defaults to 100): steps that a step is compared with; none is judged before.
        deviations (`float`, *optional*, defaults to 10.0): median deviations above the median that make a spike.
        limit (`int`, *optional*, defaults to 3): spikes that are acted on; later ones are let through.

    It never acts while the learning rate warms up. Its window, notes and count are in checkpoints, so a resumed run
    decides as the uninterrupted one.

    Raises:
        ValueError: an argument has a value that no run could use.
    """

    def __init__(self, action: str = "warn", *, window: int = 100, deviations: float = 10.0, limit: int = 3) -> None:
        validate_choice("action", action, SPIKE_ACTIONS)
        validate_count("window", window, "steps", least=2)
        validate_positive("deviations", deviations, "median deviations over the median")
        validate_count("limit", limit, "spikes")
        self.action, self.window, self.deviations, self.limit = action, window, deviations, limit
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.notes: list[dict[str, Any]] = []
        self.release: Callable[[], None] | None = None  # while a step is held

    def settings(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("action", "window", "deviations", "limit")}

    def state(self) -> dict:
        return {
            "args": self.settings(),
            "attributes": {name: list(getattr(self, name)) for name in ("losses", "norms", "notes")}
            | {"is_attached": self.is_attached},  # transformers may build a guard of its own from this
        }

    def figures(self) -> dict[str, float]:
        return {"loss_spikes": len(self.notes)} if self.notes else {}

    def refuse(self, trainer: Any) -> None:
        args = trainer.args
        if len(watches_of(trainer, LossSpikeGuard)) > 1:
            raise ValueError("two `LossSpikeGuard`s would both act on one step: pass one.")
        if trainer.is_deepspeed_enabled:
            raise NotImplementedError(
                "`LossSpikeGuard` decides before the optimizer takes a step, and DeepSpeed's engine takes it itself: "
                "use DDP or FSDP2, or leave the guard out."
            )
        if self.action == "rollback" and (args.save_strategy == "no" or args.save_only_model):
            what = "`save_strategy` is 'no'" if args.save_strategy == "no" else "`save_only_model` leaves it out"
            raise ValueError(
                f"`LossSpikeGuard(action='rollback')` goes back to a checkpoint with the optimizer, and {what}: save "
                "whole checkpoints, or choose 'skip'."
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.release is not None:
            self.release()
            self.release = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not self.is_attached:
            raise RuntimeError(
                "`LossSpikeGuard` needs a trainer of hf_longctx, which asks it before each optimizer step."
            )
        if self.window >= state.max_steps:
            raise ValueError(
                f"`window` ({self.window}) of `LossSpikeGuard` is no shorter than the run ({state.max_steps} steps), "
                f"so no step would be judged: set it below {state.max_steps}."
            )
        # transformers restores callbacks only if asked to, and a resumed run must decide as the uninterrupted one.
        saved = state.stateful_callbacks.get("LossSpikeGuard") if state.global_step else None
        saved = saved[0] if isinstance(saved, list) else saved
        for name in ("losses", "norms", "notes"):
            setattr(self, name, list(saved["attributes"][name]) if saved else [])
        state.stateful_callbacks.setdefault("LossSpikeGuard", self.state())

    def judge(self, loss: float, norm: float, is_warming_up: bool) -> str | None:
        """What of a step spikes, in words, or `None`; the numbers of a step that does not join the window."""
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            full = len(window) == self.window and not is_warming_up and len(self.notes) < self.limit
            if full and is_spike(value, window, self.deviations):
                return (
                    f"its {name} ({value:.4g}) is above {spike_threshold(window, self.deviations):.4g}, the median of "
                    f"{self.window} steps and {self.deviations:g} median deviations"
                )
        self.remember(loss, norm)
        return None

    def remember(self, loss: float, norm: float) -> None:
        """Let the numbers of a step join the window."""
        self.losses = [*self.losses, loss][-self.window :]
        self.norms = [*self.norms, norm][-self.window :]

"""The trainers' overridden methods for the watches of a long run: [`KillSwitch`], [`LossSpikeGuard`] and the rest."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import has_length

from .checkpoints import choose_checkpoint
from .held_step import hold_step
from .kill_switch import KillSwitch
from .spike_guard import LossSpikeGuard
from .watch import Watch, attach_watches, watches_of


logger = logging.getLogger(__name__)


class WatchedStepsMixin:
    """Asks the watches among the callbacks; has everything of a transformers trainer."""

    args: Any
    state: Any
    control: Any
    accelerator: Any
    callback_handler: Any
    optimizer: Any
    lr_scheduler: Any
    mesh: Any
    model_wrapped: Any
    is_fsdp_enabled: bool
    is_world_process_zero: Callable[[], bool]
    _step_losses: list[torch.Tensor] = []
    _step_is_refused = False
    _last_checkpoint: Path | None = None

    def start_watches(self, checkpoint: str | None) -> None:
        """Before a run: compare the watches of all ranks."""
        self._step_losses, self._step_is_refused = [], False
        self._last_checkpoint = None if checkpoint is None else Path(checkpoint)
        attach_watches(self)

    @property
    def _switches(self) -> list[KillSwitch]:
        return watches_of(self, KillSwitch)

    @property
    def _guard(self) -> LossSpikeGuard | None:
        return next(iter(watches_of(self, LossSpikeGuard)), None)

    def _is_killed(self) -> bool:
        """Whether this process is the one that looks, and sees a switch thrown."""
        return self.args.process_index == 0 and any(switch.is_thrown() for switch in self._switches)

    def training_step(self, model, inputs, num_items_in_batch=None):
        library: Any = super()
        loss = library.training_step(model, inputs, num_items_in_batch)
        if self._guard is not None:
            self._step_losses = [*self._step_losses, loss]
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        library: Any = super()
        norm = library._get_grad_norm(*args, **kwargs)
        guard, losses, is_refused = self._guard, self._step_losses, self._step_is_refused
        self._step_losses, self._step_is_refused = [], False
        if guard is not None and losses and not is_refused:
            self._judge_step(guard, torch.stack([loss.double() for loss in losses]).sum(), norm)
        return norm

    def _judge_step(self, guard: LossSpikeGuard, loss: torch.Tensor, norm: Any) -> None:
        """Decide for all ranks, by the mean of their losses and the largest of their norms."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        mine = torch.stack([loss, torch.as_tensor(norm).to(loss.device, torch.float64).reshape(())])
        ranks = [mine]
        if self.args.world_size > 1:
            ranks = [torch.empty_like(mine) for _ in range(self.args.world_size)]
            dist.all_gather(ranks, mine)
        numbers = torch.stack(ranks).tolist()
        mean = math.fsum(loss for loss, _ in numbers) / len(numbers)
        largest = max((norm for _, norm in numbers), key=lambda norm: math.inf if math.isnan(norm) else norm)
        if getattr(self.accelerator, "scaler", None) is not None and not math.isfinite(largest):
            return  # fp16's scaler skips this step itself, and looks for a smaller scale
        cause = guard.judge(mean, largest, self._warms_up())
        if cause is not None:
            self._act(guard, cause, mean, largest)

    def _act(self, guard: LossSpikeGuard, cause: str, loss: float, norm: float) -> None:
        step, action, done = self.state.global_step, guard.action, "the optimizer takes it"
        first, last = self._rows_before(step), self._rows_before(step + 1)
        if action == "warn":
            guard.remember(loss, norm)
        else:
            done = f"the optimizer does not take it; its rows are {first:,} to {last - 1:,} of the run"
        if action == "rollback" and self._last_checkpoint is None:
            action = "skip"
            done += ", and there is no checkpoint yet to go back to"
        elif action == "rollback":
            self._restore_checkpoint(str(self._last_checkpoint))
            done += f", and the run goes on from `{self._last_checkpoint}` with the rows after them"
        elif action == "stop":
            self.control.should_training_stop = self.control.should_save = True
            done += ", and the run is saved and ends"
        if action != "warn":
            scaler = getattr(self.accelerator, "scaler", None)
            guard.release = hold_step(self.optimizer, self.lr_scheduler, scaler)
        guard.notes.append(
            {"step": step + 1, "rows": [first, last], "loss": loss, "grad_norm": norm, "action": action}
        )
        if self.is_world_process_zero():
            left = guard.limit - len(guard.notes)
            logger.warning(f"step {step + 1} spikes: {cause}; {done}; {left} more will be acted on")

    def _restore_checkpoint(self, folder: str) -> None:
        """Weights, optimizer, schedule and scale of a checkpoint of this run, on all ranks."""
        checkpoint = choose_checkpoint(self, folder)
        library: Any = self
        library._load_from_checkpoint(checkpoint, *([self.model_wrapped] if self.is_fsdp_enabled else []))
        library._load_optimizer_and_scheduler(checkpoint)
        library._load_scaler(checkpoint)

    def _schedule_steps(self, step: int) -> float:
        """How far the learning rate is after `step` steps, in steps of its schedule."""
        return step

    def _warms_up(self) -> bool:
        warmup = self.args.get_warmup_steps(math.ceil(self._schedule_steps(self.state.max_steps)))
        return self._schedule_steps(self.state.global_step) < warmup

    def _rows_before(self, step: int) -> int:
        """Rows that all groups drew for the first `step` steps."""
        loader, count = self.callback_handler.train_dataloader, self.args.gradient_accumulation_steps
        batches = step * count
        if has_length(loader):
            epochs, step = divmod(step, -(-len(loader) // count))
            batches = epochs * len(loader) + min(step * count, len(loader))
        return batches * self.args.train_batch_size * self.mesh.data_parallel_size

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            for watch in watches_of(self, Watch):
                logs.update(watch.figures())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # the trainer's, which comes behind this mixin

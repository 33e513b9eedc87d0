"""The trainers' overridden methods for a batch ramp; see [`RampPlan`].

transformers' loop has one number of micro-batches for all steps. Here it sees one a step, the last; the ones before it
run in `training_step`, as the loop would run them: with what the user overrides, without synchronization. Everything
else (optimizer, scheduler, logs, checkpoints, the end) is the loop's own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..config.ramp import RampConfig
from .mixin import SequenceParallelMixin
from .ramp_checks import check_end, check_ramp
from .ramp_plan import RampPlan


class RampMixin(SequenceParallelMixin):
    """In front of a library's trainer class; does nothing without `RampConfig(start=...)`.

    Args:
        ramp ([`RampConfig`], *optional*): a global batch that grows.
        kwargs: see [`SequenceParallelMixin`].
    """

    ramp: RampConfig
    state: Any  # this and the rest of the library's trainer
    callback_handler: Any
    model_wrapped: Any
    _tr_loss: torch.Tensor
    current_flos: float
    _globalstep_last_logged: int
    _defer_fsdp_gradient_reduction: Any
    _planned_steps: int
    _ramp_plan: RampPlan | None = None
    _whole_accumulation: int | None = None  # while the loop sees one micro-batch a step
    _earlier_batches: list[dict] = []
    _step_count: Any = None

    def check_model(self) -> None:
        super().check_model()
        if self.ramp.is_on:
            check_ramp(self, self.ramp, self.args.world_size // self.long_context.sequence_parallel_size)

    def set_initial_training_values(self, args, dataloader):
        library: Any = super()
        values = library.set_initial_training_values(args, dataloader)
        if not self.ramp.is_on:
            return values
        epochs, per_epoch, examples, samples, total, batches, steps = values
        length = len(dataloader) if has_length(dataloader) else None
        drawn = self.args.train_batch_size * self.mesh.data_parallel_size
        self._ramp_plan = plan = RampPlan(self.ramp, drawn, args.gradient_accumulation_steps, length)
        if args.max_steps <= 0 and length is not None:
            steps = plan.steps_for(math.ceil(args.num_train_epochs * length))
        check_end(plan, steps, args.max_steps > 0)
        taken = plan.batches_after(steps)
        if args.max_steps > 0:
            epochs = epochs if length is None else -(-taken // length)
            samples = taken * drawn
        self._planned_steps = steps
        return epochs, per_epoch, examples, samples, total, length or taken, steps

    def _init_training_state(self, max_steps, *args, **kwargs):
        library: Any = super()
        place = library._init_training_state(max_steps, *args, **kwargs)
        plan = self._ramp_plan
        if plan is None or self.state.global_step == 0:
            return place
        if self.args.ignore_data_skip:
            raise NotImplementedError(
                "`ignore_data_skip` (True) begins the data anew, and `ramp` counts the rows that were drawn since the "
                "run began: set it to False, or start a new run from the checkpoint's weights."
            )
        return plan.epochs_after(self.state.global_step)

    def create_scheduler(self, num_training_steps, *args, **kwargs):
        library: Any = super()
        plan = self._ramp_plan
        if plan is None:
            return library.create_scheduler(num_training_steps, *args, **kwargs)
        scheduler = library.create_scheduler(math.ceil(plan.full_steps(num_training_steps)), *args, **kwargs)
        if isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [_by_rows(each, plan) for each in scheduler.lr_lambdas]
        elif not isinstance(scheduler, ReduceLROnPlateau) and type(scheduler).__name__ != "GreedyLR":
            raise NotImplementedError(
                f"`lr_scheduler_type` ({self.args.lr_scheduler_type!r}) makes a `{type(scheduler).__name__}`, which "
                "counts steps, and with `ramp` the learning rate follows rows: choose another schedule."
            )
        return scheduler

    def _inner_training_loop(self, *args, **kwargs):
        self._ramp_plan = None
        library: Any = super()
        return library._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, **kwargs):
        library: Any = super()
        plan = self._ramp_plan
        if plan is None:
            return library._run_epoch(**kwargs)
        step, epoch = self.state.global_step, kwargs["epoch"]
        resumed = kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]
        skipped = kwargs["steps_trained_in_current_epoch"] if resumed else 0
        last = self._planned_steps if plan.epoch is None else plan.steps_for((epoch + 1) * plan.epoch)
        kwargs["num_update_steps_per_epoch"] = skipped + last - step
        if not any(isinstance(callback, _EpochByRows) for callback in self.callback_handler.callbacks):
            self.callback_handler.callbacks.insert(0, _EpochByRows(self))
        with self._accumulating(1):
            return library._run_epoch(**kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        library: Any = super()
        plan, begun = (
            self._ramp_plan,
            getattr(self, "_initial_global_step", None),
        )  # older libraries have no such number
        if plan is not None and begun is not None:
            trained, last = self.state.global_step - begun, self.state.global_step
            rows = (plan.batches_after(last) - plan.batches_after(begun)) * plan.micro_rows
            num_train_samples = rows * self.state.max_steps / max(trained, 1)  # of which the library takes a share
        return library._finalize_training(trial, num_train_samples, start_time)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        library: Any = super()
        if self._whole_accumulation is None or self._ramp_plan is None:
            return library.get_batch_samples(epoch_iterator, num_batches, device)
        size = self._ramp_plan.size_after(self.state.global_step)
        batches, self._step_count = library.get_batch_samples(epoch_iterator, size, device)
        self._earlier_batches = batches[:-1]
        return batches[-1:], self._step_count

    def training_step(self, model, inputs, num_items_in_batch=None):
        batches, self._earlier_batches = self._earlier_batches, []
        if batches:
            self.current_gradient_accumulation_steps = len(batches) + 1
            state = self.accelerator.gradient_state
            state._set_sync_gradients(False)
            for batch in batches:
                with self._unsynchronized(model):
                    self._add_loss(self.training_step(model, batch, self._step_count))
                self.current_flos += float(self.floating_point_ops(batch))
                self._track_num_input_tokens(batch)
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
            state._set_sync_gradients(True)
        library: Any = super()
        return library.training_step(model, inputs, num_items_in_batch)

    def _unsynchronized(self, model) -> contextlib.AbstractContextManager:
        """As in the loop: gradients are exchanged with the last micro-batch."""
        state = self.accelerator.gradient_state
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if state.plugin_kwargs.get("sync_each_batch", False) or is_deepspeed:
            return contextlib.nullcontext()
        if getattr(self, "is_distributed_loading_by_transformers", False):
            from transformers.distributed.fsdp import is_fsdp_managed_module

            if is_fsdp_managed_module(self.model):
                return self._defer_fsdp_gradient_reduction()
        return self.accelerator.no_sync(model=model)

    def _add_loss(self, loss: torch.Tensor) -> None:
        if self.args.logging_nan_inf_filter and not torch.isfinite(loss):
            self._tr_loss += self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        else:
            self._tr_loss += loss

    def _schedule_steps(self, step: int) -> float:
        return step if self._ramp_plan is None else self._ramp_plan.full_steps(step)

    def _rows_before(self, step: int) -> int:
        plan = self._ramp_plan
        return super()._rows_before(step) if plan is None else plan.batches_after(step) * plan.micro_rows

    def _restore_checkpoint(self, folder: str) -> None:
        with self._accumulating(self._whole_accumulation or self.args.gradient_accumulation_steps):
            super()._restore_checkpoint(folder)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        library: Any = super()
        if self._whole_accumulation is None:
            return library._maybe_log_save_evaluate(*args, **kwargs)
        with self._accumulating(self._whole_accumulation):  # checkpoints hold the arguments
            return library._maybe_log_save_evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def _accumulating(self, count: int) -> Iterator[None]:
        """A block in which the arguments say so many accumulation steps."""
        before, whole = self.args.gradient_accumulation_steps, self._whole_accumulation
        self.args.gradient_accumulation_steps = count
        self._whole_accumulation = before if whole is None else None
        try:
            yield
        finally:
            self.args.gradient_accumulation_steps, self._whole_accumulation = before, whole
            if whole is None:
                self._earlier_batches = []


class _EpochByRows(TrainerCallback):
    """The epoch as in a run without a ramp: by micro-batches, not by steps."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        plan: RampPlan | None = self.trainer._ramp_plan
        if plan is not None:
            batches = plan.batches_after(state.global_step)
            length = plan.epoch or plan.batches_after(state.max_steps)
            state.epoch = (batches - 1) // length + ((batches - 1) % length + 1) / length


def _by_rows(rate, plan: RampPlan):
    # A plain function: torch saves the attributes of any other object with the scheduler.
    return lambda step: rate(plan.full_steps(step))

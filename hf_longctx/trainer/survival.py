"""The half of [`SequenceParallelMixin`] for what goes wrong in the middle of a run.

Every decision here is one for all ranks: what one rank has seen is reduced before any acts on it, so none waits for
another that has gone another way.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from .nonfinite import explain_step, forget_gradients, has_finite_step


logger = logging.getLogger(__name__)


class SurvivalMixin:
    """Watches each optimizer step; has `long_context` and everything of a host trainer."""

    _num_skipped_steps = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The host's, then a look at the numbers before the optimizer takes them."""
        batch = dict(inputs)  # the host holds it for the whole step anyway
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._watches_numbers:
            self._micro_batches = [*getattr(self, "_micro_batches", []), (batch, loss)]
            if self.accelerator.sync_gradients:
                self._settle_step(model, num_items_in_batch)
        return loss

    @property
    def _watches_numbers(self) -> bool:
        """fp16's loss scaler and DeepSpeed's engine skip such steps themselves, and often."""
        scales = getattr(self.accelerator, "scaler", None) is not None
        return self.long_context.on_nonfinite != "off" and not scales and not self.is_deepspeed_enabled

    def _settle_step(self, model, num_items_in_batch) -> None:
        batches, losses = (list(column) for column in zip(*self._micro_batches))
        self._micro_batches = []
        if self._agree(~has_finite_step(model, losses)):
            self._refuse_step(explain_step(self, model, batches, losses, num_items_in_batch))
            forget_gradients(model)

    def _agree(self, *seen: torch.Tensor | bool) -> bool:
        """Whether any rank has seen it. Communication: one all-reduce of an integer."""
        flag = torch.stack([torch.as_tensor(one, device=self.args.device) for one in seen]).int()
        if self.args.world_size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.any())

    def _refuse_step(self, fault: dict) -> None:
        policy = self.long_context.on_nonfinite
        sentence = f"step {self.state.global_step + 1} is not finite: {fault['sentence']}"
        if policy == "raise":
            raise RuntimeError(
                f"{sentence}. No weight was changed by it: look at these rows, lower `learning_rate`, or set "
                "`on_nonfinite` to 'skip' or 'stop'."
            )
        if fault["ruined"] is not None:
            raise RuntimeError(
                f"{sentence}. No later step can be finite, so `on_nonfinite` ({policy!r}) has nothing to save: resume "
                "from an earlier checkpoint."
            )
        self._num_skipped_steps += 1
        if policy == "stop":
            self.control.should_training_stop = self.control.should_save = True
        if self.is_world_process_zero():
            done = "the run is saved and ends" if policy == "stop" else f"skipped, {self._num_skipped_steps} so far"
            logger.warning(f"{sentence}: {done}; the optimizer did not take the step")

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._num_skipped_steps and "loss" in logs:
            logs["skipped_steps"] = self._num_skipped_steps
        super().log(logs, *args, **kwargs)

"""The half of [`TrainerBase`] for what goes wrong in the middle of a run.

Every decision here is one for all ranks: what one rank has seen is reduced before any acts on it, so none waits for
another that has gone another way.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config.run import LongContextConfig
from ..parallel.mesh import SequenceMesh
from .checkpoint_weights import load_renamed
from .checkpoints import choose_checkpoint, prove_best, write_checkpoint
from .failed_ranks import HangWatch, clear_fault, report_fault
from .nonfinite import explain_step, forget_gradients, has_finite_step
from .replicas import attach_replica_guard, random_state_hash
from .termination import EXIT_CODE, take_over_sigterm
from .watched_steps import WatchedStepsMixin


logger = logging.getLogger(__name__)


class FaultToleranceMixin(WatchedStepsMixin):
    """Watches each optimizer step; has `long_context` and everything of a transformers trainer."""

    long_context: LongContextConfig
    mesh: SequenceMesh
    is_deepspeed_enabled: bool
    add_callback: Callable[..., Any]
    _micro_batches: list[tuple[dict, torch.Tensor]]
    _num_skipped_steps = 0
    _draws_rows, _iterator = False, None
    _held_limit: int | None = None
    _to_upload: list[str] | None = None

    def _attach_guards(self) -> None:
        attach_replica_guard(self, self.long_context.check_replicas, self.mesh.sequence_parallel_size)
        self._hang_watch, self._micro_batches = HangWatch(), []
        self.add_callback(self._hang_watch)
        self._termination = take_over_sigterm(self)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """transformers' own, from a checkpoint that was validated first; see [`choose_checkpoint`].

        Raises:
            SystemExit: with 143, after a SIGTERM under `enable_jit_checkpoint`, once the checkpoint is written.
        """
        checkpoint = choose_checkpoint(self, resume_from_checkpoint)
        self.start_watches(checkpoint)
        clear_fault()
        self._micro_batches = []
        try:
            with self._termination:
                output = super().train(checkpoint, *args, **kwargs)
        except Exception as error:
            report_fault(error, self.state.global_step)
            raise
        finally:
            self._hang_watch.end()
            self._iterator = None
        if self._termination.is_agreed:
            if self.is_world_process_zero():
                folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                logger.warning(
                    f"SIGTERM: the run stops after step {self.state.global_step}, saved in "
                    f"`{Path(self.args.output_dir, folder)}`; `resume_from_checkpoint=True` goes on from there"
                )
            raise SystemExit(EXIT_CODE)
        return output

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._to_upload = uploads = []
        try:
            with self._without_rotation() as limit:
                save = super()._save_checkpoint
                write_checkpoint(self, folder, lambda: save(model, trial), limit)
            self._last_checkpoint = folder
        finally:
            self._to_upload = None
        for each in uploads:
            super()._push_from_checkpoint(each)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._to_upload is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:  # once it is whole: the mark would go along, and the record would not
            self._to_upload.append(checkpoint_folder)

    @contextlib.contextmanager
    def _without_rotation(self) -> Iterator[int | None]:
        """transformers deletes older checkpoints before the new one is known to be whole; here that comes after it."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._held_limit = limit
        try:
            yield limit
        finally:
            self.args.save_total_limit, self._held_limit = limit, None

    def _save(self, *args, **kwargs):
        held, self.args.save_total_limit = self.args.save_total_limit, self._held_limit or self.args.save_total_limit
        try:
            super()._save(*args, **kwargs)  # writes the arguments too, as the user gave them
        finally:
            self.args.save_total_limit = held

    def _finalize_training(self, *args, **kwargs):
        """transformers' own, which with `save_total_limit=1` would delete all checkpoints but the best."""
        with self._without_rotation():
            return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self):
        prove_best(self, self.state.best_model_checkpoint)
        super()._load_best_model()
        if not self.is_fsdp_enabled:
            load_renamed(self.model, Path(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint, *model):
        super()._load_from_checkpoint(resume_from_checkpoint, *model)
        if not self.is_fsdp_enabled:
            load_renamed(next(iter(model), self.model), Path(resume_from_checkpoint))

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        """transformers' own; notes whether a collator or data set draws random numbers in this process."""
        began = epoch_iterator is self._iterator  # an epoch's first fetch draws a seed for workers
        before = random_state_hash(torch.device("cpu"), everyones=True)
        batches = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        self._draws_rows |= began and random_state_hash(torch.device("cpu"), everyones=True) != before
        self._iterator = epoch_iterator
        return batches

    def training_step(self, model, inputs, num_items_in_batch=None):
        """transformers' own, then a look at the numbers before the optimizer takes them."""
        # transformers holds it for the whole step anyway; trainers that sample get rows as their data set has them.
        batch = dict(inputs) if isinstance(inputs, Mapping) else inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._watches_numbers:
            self._micro_batches.append((batch, loss))
        if self.accelerator.sync_gradients and (self._watches_numbers or self._termination.is_on or self._switches):
            self._settle_step(model, num_items_in_batch)
        return loss

    @property
    def _watches_numbers(self) -> bool:
        """fp16's loss scaler and DeepSpeed's engine skip such steps themselves, and often."""
        scales = getattr(self.accelerator, "scaler", None) is not None
        return self.long_context.on_nonfinite != "off" and not scales and not self.is_deepspeed_enabled

    def _settle_step(self, model, num_items_in_batch) -> None:
        """Decide for all ranks what any of them has seen. Communication: one all-reduce of three integers."""
        batches, losses = [batch for batch, _ in self._micro_batches], [loss for _, loss in self._micro_batches]
        self._micro_batches = []
        is_bad = ~has_finite_step(model, losses) if losses else torch.tensor(False)
        asked = torch.tensor([self._termination.is_asked, self._is_killed()])
        seen = torch.cat([flag.reshape(-1).to(self.args.device) for flag in (is_bad, asked)]).int()
        if self.args.world_size > 1:
            dist.all_reduce(seen, dist.ReduceOp.MAX)
        is_bad, self._termination.is_agreed, is_killed = map(bool, seen.tolist())
        for switch in self._switches:
            switch.is_agreed = is_killed
        self._step_is_refused = is_bad
        if is_bad:
            self._refuse_step(explain_step(self, model, batches, losses, num_items_in_batch))
            forget_gradients(model)

    def _refuse_step(self, fault: dict) -> None:
        policy, step, cause = self.long_context.on_nonfinite, self.state.global_step + 1, fault["message"]
        if policy == "raise":
            raise RuntimeError(
                f"step {step} is not finite: {cause}. No weight was changed by it: look at these rows, lower "
                "`learning_rate`, or set `on_nonfinite` to 'skip' or 'stop'."
            )
        if fault["ruined"] is not None:
            raise RuntimeError(
                f"step {step} is not finite: {cause}. No later step can be finite, so `on_nonfinite` ({policy!r}) has "
                "nothing to save: resume from an earlier checkpoint."
            )
        self._num_skipped_steps += 1
        if policy == "stop":
            self.control.should_training_stop = self.control.should_save = True
        if self.is_world_process_zero():
            done = "the run is saved and ends" if policy == "stop" else f"skipped, {self._num_skipped_steps} so far"
            logger.warning(f"step {step} is not finite: {cause}: {done}; the optimizer did not take the step")

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._num_skipped_steps and "loss" in logs:
            logs["skipped_steps"] = self._num_skipped_steps
        super().log(logs, *args, **kwargs)

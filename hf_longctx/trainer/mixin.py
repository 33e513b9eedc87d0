"""What a trainer adds to [`TrainerBase`] where its loss is a mean over tokens. No arithmetic beyond counting.

Batches arrive from the data loader already cut, their labels shifted over whole rows. transformers then counts every
token once over all ranks and accumulation steps and scales its loss by the world size, which is the gradient law; so
`compute_loss` is not touched. What a user overrides, passes or changes later is proven by numbers on the first batch,
and compared when a run starts and on every batch; see `loss_check.py`, `step_check.py` and `run_watch.py`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from ..adapters.instance_forward import PatchHandle
from ..adapters.wrapped import unwrap
from ..config.audiences import TRAINERS
from ..config.memory import MemoryConfig
from ..losses.token_mean import token_mean
from .adaptation import adapt_model, predicts_next_token
from .base import TrainerBase
from .checks import check_arguments, check_trainer
from .evaluation import ShardedEvaluationMixin
from .loss_check import prove_loss
from .memory_presets import apply_memory, prepare_memory, tile_trainer_loss
from .packed_rows import check_collator
from .run_watch import (
    ShareWatch,
    adopt_model,
    changed_facts,
    facts_of_run,
    refuse_changes,
    refuse_uncut,
    validate_replaceable,
)
from .sanity_check import SanityResult, run_sanity_check
from .shifting_loss import ShiftingLoss
from .step_check import prove_prediction_step, prove_training_step
from .true_cause import check_loss_of_trainer


class SequenceParallelMixin(ShardedEvaluationMixin, TrainerBase):
    """Put in front of a library's trainer class: `class X(SequenceParallelMixin, Trainer)`.

    Args:
        long_context ([`LongContextConfig`], *optional*): how to treat long sequences.
        memory ([`MemoryConfig`], *optional*): what is done so that a row fits.
        args, kwargs: the library's, unchanged.
    """

    memory: MemoryConfig
    accelerator: Any  # this and the next two of the library's trainer
    compute_loss_func: Any
    label_smoother: Any
    _loss_shifts_labels: bool
    configs = TRAINERS["LongContextTrainer"]
    _sanity: SanityResult | None = None
    _proven: dict[str, Any] | None = None
    _loss_is_proven = _step_is_proven = _prediction_is_proven = False
    _tiled_loss: PatchHandle | None = None
    proven_readers: frozenset[int] = frozenset()

    @cached_property
    def share_watch(self) -> ShareWatch:
        return ShareWatch()

    def prepare_arguments(self, given: dict[str, Any]) -> None:
        check_loss_of_trainer(type(self), self.long_context.sequence_parallel_size, given.get("model"))
        self._preset = prepare_memory(
            self.memory, self.long_context, given.get("args"), given.get("model"), given.get("data_collator")
        )

    def prepare_model(self) -> None:
        self.shards_batches = adapt_model(self)
        check_collator(self)
        self._wrap_losses()
        apply_memory(self, self._preset)
        # FSDP places parameters when training starts; the sanity check then runs on the first batch.
        if self.shards_batches and next(self.model.parameters()).device.type == self.args.device.type:
            self._sanity = self._check_sanity()
        elif not self.shards_batches:
            tile_trainer_loss(self, self._preset)
        self.share_watch.attach(self)
        self._proven = facts_of_run(self)

    def start_run(self) -> None:
        """Prepare and prove again what is not what was proven, before the loaders of a run are made."""
        assert self._proven is not None
        self.share_watch.forget()
        check_arguments(self.args, self.long_context)
        check_trainer(self)
        self.check_model()
        adopt_model(self)
        if not changed_facts(self, self._proven):
            return
        validate_replaceable(self, self._proven)
        if self._tiled_loss is not None:  # the sanity check looks at the model's own loss
            self._tiled_loss.remove()
        self._sanity = None
        self._loss_is_proven = self._step_is_proven = self._prediction_is_proven = False
        self.prepare_model()

    def _inner_training_loop(self, *args, **kwargs):
        self.start_run()
        return super()._inner_training_loop(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        if not self.is_in_train:
            self.start_run()
        return super().evaluate(*args, **kwargs)

    def _prepare_inputs(self, inputs):
        if self.shards_batches and self.mesh.sequence_parallel_size > 1 and "sequence_shard" not in inputs:
            refuse_uncut(self)
        return super()._prepare_inputs(inputs)

    def check_share(self, inputs: dict[str, Any]) -> None:
        if not self.is_on_trial:
            self._prove_share(inputs)
        if self._takes_shifted_labels:
            inputs["labels"] = inputs["shift_labels"]

    def _prove_share(self, inputs: dict[str, Any]) -> None:
        """Every batch: what was proven runs. The first: all that needs a model in its place, or a batch."""
        if self._proven is not None:
            refuse_changes(self, self._proven)
        if self._sanity is None:
            self._sanity = self._check_sanity()
            self._proven = facts_of_run(self)
        if not self._loss_is_proven:
            prove_loss(self, inputs)
            self._loss_is_proven = True
        if not self._is_evaluating and not self._step_is_proven:
            prove_training_step(self, inputs)
            self._step_is_proven = True
        if self._is_evaluating and not self._prediction_is_proven:
            prove_prediction_step(self, inputs)
            self._prediction_is_proven = True
        self._sanity.validate_batch(self.model, inputs["sequence_shard"], inputs)
        self.share_watch.expect(self, inputs["sequence_shard"])

    def _check_sanity(self) -> SanityResult:
        """Check the model on a tiny batch; see [`run_sanity_check`]."""
        result = run_sanity_check(
            self.model,
            self.mesh,
            self.long_context.inner_attention,
            self.shifts_labels,
            check_loss=self.uses_model_loss and self.compute_loss_func is None and self.label_smoother is None,
            context=self.accelerator.autocast(),
            adds_router_loss=self.adds_router_loss,
        )
        self.proven_readers = result.readers
        if result.loss_ignores_count:
            self.compute_loss_func = token_mean
        tile_trainer_loss(self, self._preset)
        return result

    @property
    def shifts_labels(self) -> bool:
        """Whether the model predicts the next token, so that labels are shifted before they are cut."""
        return self._loss_shifts_labels or predicts_next_token(unwrap(self.model))

    @property
    def uses_model_loss(self) -> bool:
        """Whether the trainer takes the loss from the model, not from its own head."""
        return True

    @property
    def _takes_shifted_labels(self) -> bool:
        """Whether the loss is ours to feed: it then gets the targets, not the labels."""
        ours = isinstance(self.compute_loss_func, ShiftingLoss) or self.compute_loss_func is token_mean
        return self.shifts_labels and (ours or isinstance(self.label_smoother, ShiftingLoss))

    def _wrap_losses(self) -> None:
        if self.mesh.sequence_parallel_size == 1:
            return
        shared = self.compute_loss_func is token_mean or isinstance(self.compute_loss_func, ShiftingLoss)
        if self.compute_loss_func is not None and not shared:
            self.compute_loss_func = ShiftingLoss(self.compute_loss_func, self.shifts_labels, check=True)
        smooths = self.label_smoother is not None and not isinstance(self.label_smoother, ShiftingLoss)
        if smooths and self.shifts_labels:
            self.label_smoother = ShiftingLoss(self.label_smoother, shifts=True, check=False)

    def _get_num_items_in_batch(self, batch_samples, device):
        count = super()._get_num_items_in_batch(batch_samples, device)
        if count is None or self.mesh.sp_group is None or self.args.average_tokens_across_devices:
            return count
        # Each group averages over its own rows: its ranks share one count, and the wrapper's mean over them is undone.
        count = torch.as_tensor(count, device=device).clone()
        dist.all_reduce(count, group=self.mesh.sp_group)
        return count / self.mesh.sequence_parallel_size

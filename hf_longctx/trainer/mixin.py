"""What a trainer adds to [`TrainerBase`] where its loss is a mean over tokens. No arithmetic beyond counting.

Batches arrive from the data loader already cut, their labels shifted over whole rows. transformers then counts every
token once over all ranks and accumulation steps and scales its loss by the world size, which is the gradient law; so
`compute_loss` is not touched, and `training_step` only to look at what it gave.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..adapters.wrapped import unwrap
from ..config.audiences import TRAINERS
from ..config.memory import MemoryConfig
from ..losses.token_mean import token_mean
from .adaptation import adapt_model, predicts_next_token
from .base import TrainerBase
from .evaluation import ShardedEvaluationMixin
from .memory_presets import apply_memory, prepare_memory, tile_trainer_loss
from .packed_rows import check_collator
from .sanity_check import SanityResult, run_sanity_check
from .shifting_loss import ShiftingLoss


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

    def prepare_arguments(self, given: dict[str, Any]) -> None:
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

    def check_share(self, inputs: dict[str, Any]) -> None:
        if self._sanity is None:
            self._sanity = self._check_sanity()
        self._sanity.validate_batch(self.model, inputs["sequence_shard"], inputs)
        if self._takes_shifted_labels:
            inputs["labels"] = inputs["shift_labels"]

    def _check_sanity(self) -> SanityResult:
        """Check the model on a tiny batch; see [`run_sanity_check`]."""
        own_loss = self.compute_loss_func is None and self.label_smoother is None
        result = run_sanity_check(
            self.model,
            self.mesh,
            self.long_context.inner_attention,
            self.shifts_labels,
            check_loss=own_loss and self.uses_model_loss,
            context=self.accelerator.autocast(),
        )
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
        if self.compute_loss_func is not None:
            self.compute_loss_func = ShiftingLoss(self.compute_loss_func, self.shifts_labels, check=True)
        if self.label_smoother is not None and self.shifts_labels:
            self.label_smoother = ShiftingLoss(self.label_smoother, shifts=True, check=False)

    def _get_num_items_in_batch(self, batch_samples, device):
        count = super()._get_num_items_in_batch(batch_samples, device)
        if count is None or self.mesh.sp_group is None or self.args.average_tokens_across_devices:
            return count
        # Each group averages over its own rows: its ranks share one count, and the wrapper's mean over them is undone.
        count = torch.as_tensor(count, device=device).clone()
        dist.all_reduce(count, group=self.mesh.sp_group)
        return count / self.mesh.sequence_parallel_size

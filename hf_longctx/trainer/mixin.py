"""The seams between a host trainer and a sharded batch. No arithmetic beyond counting.

Batches arrive from the data loader already cut, with their labels shifted over whole rows. The host then counts every
token once over all ranks and accumulation steps and scales its loss by the world size, which is the gradient law; so
neither `compute_loss` nor `training_step` is touched.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..config import LongContextConfig
from ..losses.token_mean import token_mean
from ..parallel.mesh import SequenceMesh
from ..parallel.shard import validate_same_rows
from .checks import check_arguments, check_model, check_trainer, uses_ulysses
from .evaluation import ShardedEvaluationMixin
from .loaders import build_loader
from .loss import AlignedLoss
from .probe import ProbeResult, probe_model


class SequenceParallelMixin(ShardedEvaluationMixin):
    """Put in front of a host trainer class: `class X(SequenceParallelMixin, Trainer)`.

    Args:
        long_context ([`LongContextConfig`], *optional*): how to treat long sequences; everything else is the host's.
    """

    def __init__(self, *args, long_context: LongContextConfig | None = None, **kwargs) -> None:
        self.long_context = long_context or LongContextConfig()
        check_arguments(kwargs.get("args", args[1] if len(args) > 1 else None), self.long_context)
        super().__init__(*args, **kwargs)
        check_arguments(self.args, self.long_context)
        check_trainer(self)
        check_model(self.model, self.long_context)
        self.mesh = SequenceMesh.build(self.long_context.sequence_parallel_size)
        self.shards_batches = uses_ulysses(self.model)
        self._probe = ProbeResult()
        self._align_losses()
        if self.shards_batches and self.long_context.check_model and self.mesh.world_size > 1:
            if next(self.model.parameters()).device.type == self.args.device.type:
                self.probe()
            else:  # FSDP places parameters when training starts
                self.add_callback(_ProbeAtStart(self))

    def probe(self) -> None:
        """Check the model on a tiny batch; see [`probe_model`]."""
        own_loss = self.compute_loss_func is None and self.label_smoother is None
        self._probe = probe_model(
            self.model,
            self.mesh,
            self.long_context.inner_attention,
            self.shifts_labels,
            check_loss=own_loss and self.uses_model_loss,
            context=self.accelerator.autocast(),
        )
        if self._probe.loss_ignores_count:
            self.compute_loss_func = token_mean

    @property
    def shifts_labels(self) -> bool:
        """Whether the model predicts the next token, so that labels are shifted before they are cut."""
        return self._loss_shifts_labels

    @property
    def uses_model_loss(self) -> bool:
        """Whether the host takes the loss from the model, not from its own head."""
        return True

    @property
    def _aligns_labels(self) -> bool:
        return isinstance(self.compute_loss_func, AlignedLoss) or isinstance(self.label_smoother, AlignedLoss)

    def _align_losses(self) -> None:
        if self.mesh.sequence_parallel_size == 1 or not self.shifts_labels:
            return
        if self.compute_loss_func is not None:
            self.compute_loss_func = AlignedLoss(self.compute_loss_func, check=True)
        if self.label_smoother is not None:
            self.label_smoother = AlignedLoss(self.label_smoother, check=False)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if not self.shards_batches:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        return build_loader(self, dataset, description, batch_size, sampler_fn, is_training)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        shard = inputs.get("sequence_shard")
        if shard is None or shard.group is not None:
            return inputs
        # A new object, so that what the layers plan for it is freed with these inputs, not with the loader's batch.
        inputs["sequence_shard"] = shard = shard.bind(self.mesh).to(self.args.device)
        validate_same_rows(shard)
        if self._aligns_labels:
            inputs["labels"] = inputs["shift_labels"]
        return inputs

    def _get_num_items_in_batch(self, batch_samples, device):
        count = super()._get_num_items_in_batch(batch_samples, device)
        if count is None or self.mesh.sp_group is None or self.args.average_tokens_across_devices:
            return count
        # Each group averages over its own rows: its ranks share one count, and the wrapper's mean over them is undone.
        count = torch.as_tensor(count, device=device).clone()
        dist.all_reduce(count, group=self.mesh.sp_group)
        return count / self.mesh.sequence_parallel_size

    def _track_num_input_tokens(self, inputs):
        shard = inputs.get("sequence_shard")
        if shard is not None:  # the pad segment is not input
            real = ("input_ids", "attention_mask")
            inputs = {key: value[:, : shard.num_local_tokens] for key, value in inputs.items() if key in real}
        super()._track_num_input_tokens(inputs)

    def get_total_train_batch_size(self, args) -> int:
        return super().get_total_train_batch_size(args) // self.mesh.sequence_parallel_size


class _ProbeAtStart(TrainerCallback):
    """Runs the probe once the model is on its device."""

    def __init__(self, trainer: SequenceParallelMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.probe()

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
from .loaders import build_loader
from .loss import AlignedLoss
from .probe import ProbeResult, probe_model


class SequenceParallelMixin:
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
        self._eval_sums: torch.Tensor | None = None
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
        if shard is not None and shard.group is None and self.mesh.sp_group is not None:
            shard = shard.bind(self.mesh).to(self.args.device)
            validate_same_rows(shard)
            inputs["sequence_shard"] = shard
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

    def predict(self, *args, **kwargs):
        self._refuse_logits(self.args.prediction_loss_only)
        return super().predict(*args, **kwargs)

    def _refuse_logits(self, loss_only: bool) -> None:
        if self.mesh.sequence_parallel_size > 1 and not loss_only:
            raise NotImplementedError(
                "`predict` returns the logits of whole rows, which no rank holds under sharding: set "
                "`prediction_loss_only=True`, or predict with `sequence_parallel_size` 1."
            )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of one evaluation batch over all ranks; the sums behind it are kept for [`evaluation_loop`]."""
        self._refuse_logits(prediction_loss_only)
        if not prediction_loss_only or not self.shards_batches:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            count = self._get_num_items_in_batch([inputs], self.args.device)
            loss = self.compute_loss(model, inputs, num_items_in_batch=count).detach()
        share = loss * count
        if self.args.average_tokens_across_devices:
            share = share / self.mesh.world_size  # the host multiplied by it
        targets = inputs["shift_labels"] if self.shifts_labels else inputs["labels"]
        self._eval_sums += torch.stack([share, (targets != -100).sum()]).to(self._eval_sums)
        return loss, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The host's loop, with `eval_loss` as the mean over all tokens of the set, and no trace left in the model."""
        fresh = not self.is_in_train and self.model_wrapped is self.model
        self._eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self._eval_sums, "sum").tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        if fresh and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # The host marks the bare model as prepared, and `train()` would then never wrap it: ranks would drift
            # apart.
            self.model = self.model_wrapped = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
        return output


class _ProbeAtStart(TrainerCallback):
    """Runs the probe once the model is on its device."""

    def __init__(self, trainer: SequenceParallelMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.probe()

"""The seams between a host trainer and a sharded batch. No arithmetic beyond counting.

Batches arrive from the data loader already cut, with their labels shifted over whole rows. The host then counts every
token once over all ranks and accumulation steps and scales its loss by the world size, which is the gradient law; so
`compute_loss` is not touched, and `training_step` only to look at what it gave.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from transformers.loss.loss_utils import LOSS_MAPPING

from ..adapters.wrapped import unwrap
from ..config.run import LongContextConfig
from ..data.packing.collator import READ_COLUMNS, PackingCollator, fills_rows
from ..losses.token_mean import token_mean
from ..parallel.mesh import SequenceMesh
from ..parallel.shard import SequenceShard, validate_same_rows
from ..resilience.fault_tolerance import SurvivalMixin
from .adapt import adapt_model
from .checks import check_arguments, check_model, check_trainer, warn_about_dropout
from .evaluation import ShardedEvaluationMixin
from .loaders import build_loader, check_streams, never_ends
from .memory import apply_memory, prepare_memory, tile_trainer_loss
from .packed_rows import check_collator, check_packed_batch, pack_dataset
from .sanity_check import ProbeResult, probe_model
from .shifting_loss import AlignedLoss


class SequenceParallelMixin(SurvivalMixin, ShardedEvaluationMixin):
    """Put in front of a host trainer class: `class X(SequenceParallelMixin, Trainer)`.

    Args:
        long_context ([`LongContextConfig`], *optional*): how to treat long sequences; everything else is the host's.
    """

    deals_shards = True

    def __init__(self, *args, long_context: LongContextConfig | None = None, **kwargs) -> None:
        self.long_context = long_context or LongContextConfig()
        given = dict(zip(("model", "args", "data_collator"), args)) | kwargs
        check_arguments(given.get("args"), self.long_context)
        self._memory = prepare_memory(self.long_context, *map(given.get, ("args", "model", "data_collator")))
        super().__init__(*args, **kwargs)
        check_arguments(self.args, self.long_context)
        check_trainer(self)
        check_streams(self)
        check_model(self.model, self.long_context)
        warn_about_dropout(self.model, self.long_context.sequence_parallel_size)
        self.mesh = SequenceMesh.build(
            self.long_context.sequence_parallel_size, timedelta(seconds=self.args.ddp_timeout)
        )
        self.shards_batches = adapt_model(self)
        check_collator(self)
        self._probe: ProbeResult | None = None
        self._checks_packing = self.long_context.check_packing
        self._align_losses()
        self._attach_guards()
        apply_memory(self, self._memory)
        # FSDP places parameters when training starts; the probe then runs on the first batch.
        if self.shards_batches and next(self.model.parameters()).device.type == self.args.device.type:
            self._probe = self._run_probe()
        elif not self.shards_batches:
            tile_trainer_loss(self, self._memory)

    def _run_probe(self) -> ProbeResult:
        """Check the model on a tiny batch; see [`probe_model`]."""
        own_loss = self.compute_loss_func is None and self.label_smoother is None
        result = probe_model(
            self.model,
            self.mesh,
            self.long_context.inner_attention,
            self.shifts_labels,
            check_loss=own_loss and self.uses_model_loss,
            context=self.accelerator.autocast(),
        )
        if result.loss_ignores_count:
            self.compute_loss_func = token_mean
        tile_trainer_loss(self, self._memory)
        return result

    @property
    def shifts_labels(self) -> bool:
        """Whether the model predicts the next token, so that labels are shifted before they are cut."""
        loss_type = getattr(unwrap(self.model), "loss_type", None)
        # The host falls back to this loss for a class whose name it does not know, such as GPT-2's.
        return self._loss_shifts_labels or loss_type not in LOSS_MAPPING

    @property
    def uses_model_loss(self) -> bool:
        """Whether the host takes the loss from the model, not from its own head."""
        return True

    @property
    def _takes_shifted_labels(self) -> bool:
        """Whether the loss is ours to feed: it then gets the targets, not the labels."""
        ours = isinstance(self.compute_loss_func, AlignedLoss) or self.compute_loss_func is token_mean
        return self.shifts_labels and (ours or isinstance(self.label_smoother, AlignedLoss))

    def _align_losses(self) -> None:
        if self.mesh.sequence_parallel_size == 1:
            return
        if self.compute_loss_func is not None:
            self.compute_loss_func = AlignedLoss(self.compute_loss_func, self.shifts_labels, check=True)
        if self.label_smoother is not None and self.shifts_labels:
            self.label_smoother = AlignedLoss(self.label_smoother, shifts=True, check=False)

    def _set_signature_columns_if_needed(self):
        """The columns that the host does not remove: the model's, and those that tell the collator what to train."""
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, PackingCollator):
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *READ_COLUMNS]))

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if self.shards_batches or (is_training and never_ends(self, dataset)):
            return build_loader(self, dataset, description, batch_size, sampler_fn, is_training)
        if fills_rows(self.data_collator):
            group_size = batch_size * self.mesh.data_parallel_size
            dataset, sampler_fn = pack_dataset(self, dataset, description, group_size, sampler_fn, is_training)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        shard = inputs.get("sequence_shard")
        if shard is not None and shard.group is None:
            inputs["sequence_shard"] = self._bind(shard, inputs)
            if self._takes_shifted_labels:
                inputs["labels"] = inputs["shift_labels"]
        if self._checks_packing and check_packed_batch(self, inputs):
            self._checks_packing = False
        return inputs

    def _bind(self, shard: SequenceShard, inputs: dict[str, object]) -> SequenceShard:
        if self._probe is None:
            self._probe = self._run_probe()
        # A new object, so that what the layers plan for it is freed with these inputs, not with the loader's batch.
        shard = shard.bind(self.mesh).to(self.args.device)
        self._probe.validate_batch(self.model, shard, inputs)
        validate_same_rows(shard)
        return shard

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

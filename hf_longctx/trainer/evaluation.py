"""Evaluation under sharding: at training length, every token counted once, no trace left for the training after."""

from __future__ import annotations

from typing import Any

import torch

from ..adapters.router_losses import asks_for_router_loss
from ..adapters.wrapped import unwrap
from ..parallel.collectives import gather_integers
from ..parallel.mesh import SequenceMesh
from ..parallel.shard import IGNORE_INDEX


class ShardedEvaluationMixin:
    """The evaluation half of [`SequenceParallelMixin`], which has `mesh`, `shards_batches` and `shifts_labels`."""

    mesh: SequenceMesh
    args: Any  # this and the next three of the trainer that it is part of
    model: Any
    _get_num_items_in_batch: Any
    uses_model_loss: Any
    _eval_sums: torch.Tensor | None = None
    _num_eval_steps = 0
    _is_evaluating = is_on_trial = False
    share_watch: Any

    def predict(self, *args, **kwargs):
        self._refuse_logits(self.args.prediction_loss_only)
        if not self.is_in_train:
            self.start_run()
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
        self._num_eval_steps += 1
        counts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not (prediction_loss_only and self.shards_batches and counts):
            output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            self._validate_share()
            return output
        inputs = self._prepare_inputs(inputs)
        targets = inputs["shift_labels"] if self.shifts_labels else inputs["labels"]
        valid = (targets != IGNORE_INDEX).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            count, weight = self._count_and_weight(inputs, valid)
            loss = self.compute_loss(model, inputs, num_items_in_batch=count).detach()
        self._validate_share()
        self._eval_sums += torch.stack([loss * weight, valid]).to(self._eval_sums)
        return loss, None, None

    def _count_and_weight(self, inputs: dict[str, Any], valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `compute_loss` divides by, and by what its value is multiplied to be this rank's part of the sum."""
        averages, mesh = self.args.average_tokens_across_devices, self.mesh
        if not self.adds_router_loss:
            # A batch of dummy rows alone has no token on any rank; its loss is then zero.
            count = torch.as_tensor(self._get_num_items_in_batch([inputs], self.args.device)).clamp(min=1)
            return count, count / mesh.world_size if averages else count  # `compute_loss` multiplied by it
        # The loss of its routers is that of a group's own rows, and weighs as much as they do.
        of_group = valid.new_tensor(sum(gather_integers(int(valid), mesh.sp_group)))
        ranks = mesh.sequence_parallel_size
        count = of_group.clamp(min=1)
        return count * mesh.data_parallel_size if averages else count / ranks, of_group / ranks

    @property
    def batch_weight(self) -> float:
        # transformers multiplies the model's loss by all ranks, so the ranks of a group hold a part each. Where one
        # batch stands for all, as in evaluation and on trial, the groups do too.
        if not (self.uses_model_loss and self.args.average_tokens_across_devices):
            return 1.0
        alone = self.is_on_trial or self._is_evaluating
        return 1.0 / (self.mesh.world_size if alone else self.mesh.sequence_parallel_size)

    @property
    def adds_router_loss(self) -> bool:
        """Whether the loss of the model's routers is trained: as its configuration says, or TRL's settings."""
        return getattr(self, "aux_loss_enabled", False) or asks_for_router_loss(unwrap(self.model))

    def _validate_share(self) -> None:
        if not self.is_on_trial:
            self.share_watch.validate()

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The trainer's loop, with the loss as the mean over all tokens of the set."""
        self._num_eval_steps = 0
        self._eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self._is_evaluating = True
        try:
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        finally:
            self._is_evaluating = False
        total, count = self.accelerator.reduce(self._eval_sums, "sum").tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The trainer's log, with evaluation steps counted: it derives them as if every process read other rows."""
        for key in [key for key in logs if key.endswith("_runtime") and not key.startswith("train")]:
            speed = key.removesuffix("_runtime") + "_steps_per_second"
            if speed in logs and logs[key]:
                logs[speed] = round(self._num_eval_steps / logs[key], 3)
        library: Any = super()  # of the trainer behind this mixin
        library.log(logs, *args, **kwargs)

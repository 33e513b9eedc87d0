"""Evaluation under sharding: at training length, every token counted once, no trace left for the training after."""

from __future__ import annotations

from typing import Any

import torch

from ..parallel.mesh import SequenceMesh
from ..parallel.shard import IGNORE_INDEX


class ShardedEvaluationMixin:
    """The evaluation half of [`SequenceParallelMixin`], which has `mesh`, `shards_batches` and `shifts_labels`."""

    mesh: SequenceMesh
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
        with torch.no_grad(), self.compute_loss_context_manager():
            # A batch of dummy rows alone has no token on any rank; its loss is then zero.
            count = torch.as_tensor(self._get_num_items_in_batch([inputs], self.args.device)).clamp(min=1)
            loss = self.compute_loss(model, inputs, num_items_in_batch=count).detach()
        self._validate_share()
        share = loss * count
        if self.args.average_tokens_across_devices:
            share = share / self.mesh.world_size  # `compute_loss` multiplied by it
        targets = inputs["shift_labels"] if self.shifts_labels else inputs["labels"]
        self._eval_sums += torch.stack([share, (targets != IGNORE_INDEX).sum()]).to(self._eval_sums)
        return loss, None, None

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

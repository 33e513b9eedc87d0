"""One batch of whole rows for all ranks of a group: loaders, token counts and evaluation where a model cuts its rows.

Batches go to groups as accelerate gives them to processes. What every rank of a group computes is the same, so means
over ranks are means over groups; the loss of an evaluation weighs batches by their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from ..parallel.mesh import SequenceMesh
from .loaders import assign_to_groups


class GroupBatchesMixin:
    """In front of [`TrainerBase`], which has `mesh`."""

    mesh: SequenceMesh
    args: Any  # this and the next two of the library's trainer
    accelerator: Any
    data_collator: Any
    _eval_rows: tuple[int, float, float] | None = None
    _num_eval_rows: int | None = None

    @property
    def gives_whole_rows(self) -> bool:
        """Whether the ranks of a group get the same batch of whole rows."""
        return self.mesh.sequence_parallel_size > 1

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if is_training or not self.gives_whole_rows:
            library: Any = super()
            return library._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        return self._evaluation_loader(dataset, description, batch_size)

    def _evaluation_loader(self, dataset, description: str, batch_size: int) -> DataLoader:
        """Batches in turn to the groups, as accelerate gives them to as many processes: the last one is filled up."""
        trainer: Any = self
        collator = trainer._get_collator_with_removed_columns(self.data_collator, description=description)
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=None if isinstance(dataset, IterableDataset) else SequentialSampler(dataset),
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return assign_to_groups(self, loader, self.mesh.data_parallel_size)

    def _track_num_input_tokens(self, inputs):
        """Each rank counts its columns of the rows that its group has."""
        library: Any = super()
        size, rank = self.mesh.sequence_parallel_size, self.mesh.sequence_parallel_rank
        mine = {key: inputs[key][:, rank::size] for key in ("input_ids", "attention_mask") if key in inputs}
        library._track_num_input_tokens(mine if self.gives_whole_rows else inputs)

    def predict(self, *args, **kwargs):
        if self.gives_whole_rows and not self.args.prediction_loss_only:
            raise NotImplementedError(
                "`predict` returns the logits of whole rows once for every rank of a group: set "
                "`prediction_loss_only=True`, or predict with `sequence_parallel_size` 1."
            )
        library: Any = super()
        return library.predict(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        library: Any = super()
        output = library.prediction_step(model, inputs, *args, **kwargs)
        if self._eval_rows is not None and output[0] is not None:
            step, total, weight = self._eval_rows
            rows = self._rows_of_step(step, inputs)
            self._eval_rows = step + 1, total + float(output[0]) * rows, weight + rows
        return output

    def _rows_of_step(self, step: int, inputs: Mapping[str, Any]) -> int:
        """Rows of this group's batch that are not there to fill up the last one."""
        if self._num_eval_rows is None:
            return len(inputs["input_ids"])
        size = self.args.eval_batch_size
        first = (step * self.mesh.data_parallel_size + self.mesh.data_parallel_rank) * size
        return min(max(self._num_eval_rows - first, 0), size)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The library's loop, with the loss as the mean of batches weighed by their rows."""
        dataset = getattr(dataloader, "dataset", None)
        self._num_eval_rows = len(dataset) if hasattr(dataset, "__len__") else None
        self._eval_rows = (0, 0.0, 0.0) if self.gives_whole_rows else None
        try:
            library: Any = super()
            output = library.evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            if self._eval_rows is not None:
                sums = torch.tensor(self._eval_rows[1:], dtype=torch.float64, device=self.args.device)
                total, count = self.accelerator.reduce(sums, "sum").tolist()
                if count:
                    output.metrics[f"{metric_key_prefix}_loss"] = total / count
        finally:
            self._eval_rows = None
        return output

"""The trainers' overridden methods for rows of a blend: read in order, and their marks taken off each batch."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils.data import SequentialSampler

from ..data.blend.blended_rows import SOURCE_MARKS, find_blend
from ..data.blend.marked_collator import MarkedCollator
from ..data.packing.collator import PackingCollator, fills_rows
from ..data.packing.datasets import PackedDataset
from ..parallel.shard import IGNORE_INDEX
from ..reporting.blend_report import BlendReport
from .mixin import SequenceParallelMixin


logger = logging.getLogger(__name__)


class BlendMixin(SequenceParallelMixin):
    """In front of a library's trainer class, like the mixin below; does nothing without a [`BlendedRows`]."""

    train_dataset: Any  # this and the next of the library's trainer
    data_collator: Any
    blend_report: BlendReport | None = None

    def start_run(self) -> None:
        super().start_run()
        if find_blend(self.train_dataset) is not None and self.args.max_steps <= 0 and self.args.num_train_epochs > 1:
            logger.warning(
                "`num_train_epochs` (%s) reads the same rows of the blend in the same order again: set it to 1 and "
                "`num_rows` of `BlendedRows` to the rows of the run, whose passes have orders of their own",
                self.args.num_train_epochs,
            )

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if find_blend(dataset) is None:
            library: Any = super()
            return library._get_train_sampler(train_dataset)
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy` ({strategy!r}) sorts the rows of a blend, whose order keeps the "
                "proportions of its sources: leave it out."
            )
        return SequentialSampler(dataset)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        given, blend = self.data_collator, find_blend(dataset)
        if blend is not None and is_training and fills_rows(given) and given.strategy != "in_order":
            if not isinstance(dataset, PackedDataset):
                raise ValueError(
                    f"`strategy` ({given.strategy!r}) sorts the rows of a blend by length, so that no prefix has its "
                    "proportions: set `strategy='in_order'`."
                )
        if blend is not None and blend.marks_sources and not isinstance(given, PackingCollator):
            self.data_collator = MarkedCollator(given)
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.data_collator = given

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if SOURCE_MARKS not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, SOURCE_MARKS]

    def _prepare_inputs(self, inputs):
        marks = inputs.pop(SOURCE_MARKS, None) if isinstance(inputs, dict) else None
        inputs = super()._prepare_inputs(inputs)
        if marks is not None and self.blend_report is not None and not self._is_evaluating and not self.is_on_trial:
            self.blend_report.expect(marks.to(self.args.device), self._targets_of(inputs))
        return inputs

    def _targets_of(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """The label that each token of a share predicts."""
        if inputs.get("shift_labels") is not None or inputs.get("labels") is None:
            return inputs.get("shift_labels")
        if not self.shifts_labels:
            return inputs["labels"]
        return torch.nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]

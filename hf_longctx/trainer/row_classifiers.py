"""`LongContextTrainer` with a head that pools a row (`AutoModelForSequenceClassification`), on shared rows.

The model gets whole rows on every rank of a group and cuts them itself (`pooled_rows.py`), so loss and labels are
those of whole rows, and no loss over tokens has to be proven. The rest of a trainer's start is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from ..adapters.wrapped import runs_our_attention, unwrap
from ..config.run import LongContextConfig
from ..data.packing.collator import PackingCollator, fills_rows
from .checks import check_arguments, check_trainer
from .group_batches import GroupBatchesMixin
from .language_model import LanguageModelMixin
from .memory_presets import apply_memory, tile_trainer_loss
from .pooled_rows import pool_whole_rows, pools_rows
from .run_watch import adopt_model
from .whole_rows import RowSharing, rows_shared
from .whole_rows_checks import in_place, prove_whole_rows


class RowClassifierMixin(GroupBatchesMixin, LanguageModelMixin):
    """In front of a library's trainer class; does nothing where the model gives a vector a token."""

    long_context: LongContextConfig
    model: Any
    model_accepts_loss_kwargs: bool
    attach_rows = staticmethod(pool_whole_rows)
    _prepared: Any = None

    @property
    def classifies_rows(self) -> bool:
        """Whether the model's head pools a row, under an attention of ours."""
        return pools_rows(self.model) and runs_our_attention(self.model)

    @property
    def gives_whole_rows(self) -> bool:
        return self.classifies_rows and super().gives_whole_rows

    @property
    def sharing(self) -> RowSharing:
        return RowSharing(self.mesh, self.long_context.inner_attention)

    def prepare_model(self) -> None:
        if not self.classifies_rows:
            super().prepare_model()
            return
        _refuse_packing(self.model, self.data_collator)
        if self.indexer.loss is not None:
            raise NotImplementedError(
                f"`loss` ({self.indexer.loss!r}) of `IndexerConfig` trains indexers next to a loss over tokens, and "
                f"`{type(unwrap(self.model)).__name__}` has one over rows: leave it out."
            )
        if self.ramp.is_on:
            raise NotImplementedError(
                f"`start` ({self.ramp.start!r}) of `RampConfig` counts the tokens of a step, and the loss of "
                f"`{type(unwrap(self.model)).__name__}` is one over rows: leave it out."
            )
        if self.sleep.window is not None:
            raise NotImplementedError(
                f"`window` ({self.sleep.window}) of `SleepConfig` cuts rows for a loss over tokens, and the loss of "
                f"`{type(unwrap(self.model)).__name__}` is one over rows: leave it out."
            )
        # Its loss is of rows: nothing is cut by a loader, and there is no loss over a vocabulary to tile.
        self.shards_batches = False
        self._checks_packing = self._checks_packing and not self.gives_whole_rows  # there the patch looks
        apply_memory(self, self._preset, compares_plan=False)
        tile_trainer_loss(self, self._preset)
        if self.gives_whole_rows:
            prove_whole_rows(self.model, self.sharing, self.attach_rows, in_place(self), self.accelerator.autocast)
        self._prepared = self.model

    def start_run(self) -> None:
        if not self.classifies_rows:
            super().start_run()
            return
        check_arguments(self.args, self.long_context)
        check_trainer(self)
        self.check_model()
        adopt_model(self)
        if self.model is not self._prepared:
            self.prepare_model()

    def _validate_share(self) -> None:
        if not self.classifies_rows:  # whose forward is given whole rows, and no shard that layers must read
            super()._validate_share()

    @property
    def uses_model_loss(self) -> bool:
        return not self.classifies_rows

    def _get_num_items_in_batch(self, batch_samples, device):
        count = super()._get_num_items_in_batch(batch_samples, device)
        # transformers adds up the rows of all ranks, and the ranks of a group have the same.
        averages = count is not None and self.gives_whole_rows and self.args.average_tokens_across_devices
        return count / self.mesh.sequence_parallel_size if averages else count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        library: Any = super()
        if not self.gives_whole_rows:
            return library.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with rows_shared(self.sharing, self.model):
            loss, outputs = library.compute_loss(model, inputs, True, num_items_in_batch)
        counts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if counts and num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # transformers has multiplied it by all ranks, over which gradients are averaged; rows differ by group.
            loss = loss / self.mesh.sequence_parallel_size
        return (loss, outputs) if return_outputs else loss


def _refuse_packing(model: torch.nn.Module, collator: Any) -> None:
    if isinstance(collator, PackingCollator) or fills_rows(collator):
        raise NotImplementedError(
            f"`{type(unwrap(model)).__name__}` has a head that pools a row, and would pool the documents of a packed "
            "one together: train it on padded rows, without a `PackingCollator`."
        )

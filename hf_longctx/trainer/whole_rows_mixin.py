"""What a trainer adds to [`TrainerBase`] where its loss looks at whole rows: preference pairs and rewards.

Loaders give one batch to all ranks of a group, with TRL's collator as it is. The models cut the rows, so
`shards_batches` stays false. While a loss is computed, and reference numbers are, rows are shared; at all other times
a forward is the process's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config.memory import MemoryConfig
from ..config.pair_rows import PreferenceConfig
from .base import TrainerBase
from .checks import check_model
from .group_accelerator import GroupAccelerator
from .group_batches import GroupBatchesMixin
from .inner_checks import check_given, has_fast_weights, refuse_built
from .memory_presets import apply_memory, prepare_memory, tile_model_mlps, tile_trainer_loss
from .whole_rows import RowSharing, rows_shared
from .whole_rows_checks import (
    check_flattened,
    in_place,
    named,
    prove_whole_rows,
    refuse_images,
    refuse_no_rows,
    warn_dropped_rows,
)


class WholeRowsMixin(GroupBatchesMixin, TrainerBase):
    """In front of a TRL trainer whose loss needs whole rows: `class X(WholeRowsMixin, DPOTrainer)`.

    Args:
        long_context ([`LongContextConfig`], *optional*): number of processes that share a row, and the inner kernel.
        memory ([`MemoryConfig`], *optional*): what is done so that a row fits.
        args, kwargs: the library's, unchanged.

    Attributes:
        attach_rows (`Callable`): puts the patch of this loss on a model; see `scored_rows.py` and `pooled_rows.py`.
    """

    memory: MemoryConfig
    preference = PreferenceConfig()
    accelerator: Any  # this and the next two of the library's trainer
    model: Any
    _tp_size: int
    attach_rows: Callable
    uses_model_loss = False
    _are_rows_shared = False

    def prepare_arguments(self, given: dict[str, Any]) -> None:
        check_given(given, self.long_context, self.memory)
        refuse_images(given.get("train_dataset"), self.long_context.sequence_parallel_size)
        if self.memory.memory == "auto":
            raise NotImplementedError(
                "`memory` ('auto') plans the step of one language model, and preference losses run several forwards "
                "on twice as many rows: set it to 'checkpoint' or 'max'."
            )
        if self.memory.reversible_layers:
            raise NotImplementedError(
                "`reversible_layers` (True) makes the trained model another function than its reference, and was not "
                "compared with these losses: leave it out."
            )
        self._preset = prepare_memory(
            self.memory, self.long_context, given.get("args"), given.get("model"), given.get("data_collator")
        )

    def models(self) -> dict[str, Any]:
        """The models that a step calls, by the name under which the user gave them."""
        models = {"model": self.model, "ref_model": getattr(self, "ref_model", None)}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def changes_rows(self) -> bool:
        """Whether models get anything but the padded rows of their own process."""
        return self.long_context.sequence_parallel_size > 1 or self.preference.flatten_rows

    @property
    def sharing(self) -> RowSharing:
        return RowSharing(self.mesh, self.long_context.inner_attention, self.preference.flatten_rows)

    def check_model(self) -> None:
        for name, model in self.models().items():
            with named(name):
                check_model(model, self.long_context)
                if has_fast_weights(model):
                    refuse_built(self)
                if self.preference.flatten_rows:
                    check_flattened(model)

    def prepare_model(self) -> None:
        self._checks_packing = False  # rows are flattened here, and proven here
        apply_memory(self, self._preset, compares_plan=False)
        reference = getattr(self, "ref_model", None)
        if reference is not None:  # its forward runs where the policy's activations are kept
            tile_model_mlps(self, reference, self._preset)
        tile_trainer_loss(self, self._preset)
        self.share_rows()
        # TRL divides its token counts by it: the ranks of a group count the same batch.
        self._tp_size *= self.mesh.sequence_parallel_size

    def share_rows(self) -> None:
        """Patch the models, and prove on tiny rows that nothing else changed."""
        if self._are_rows_shared or not self.changes_rows:
            return
        for name, model in self.models().items():
            with named(name):
                placed = in_place(self, model)
                prove_whole_rows(model, self.sharing, self.attach_rows, placed, self.accelerator.autocast)
        self._are_rows_shared = True

    # What the library calls

    def compute_loss(self, *args, **kwargs):
        library: Any = super()
        with rows_shared(self.sharing, *self.models().values()):
            return library.compute_loss(*args, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name, *others, **kwargs):
        library: Any = super()
        refuse_no_rows(dataset, dataset_name)
        prepared = library._prepare_dataset(dataset, processing_class, args, dataset_name, *others, **kwargs)
        warn_dropped_rows(dataset, prepared, args, dataset_name)
        return prepared

    def _precompute_ref_logps(self, dataset, name, batch_size):
        library: Any = super()
        if not self.changes_rows:
            return library._precompute_ref_logps(dataset, name, batch_size)
        self.check_model()
        self.build_mesh()
        self.share_rows()
        accelerator, self.accelerator = self.accelerator, GroupAccelerator(self.accelerator, self)
        try:
            with rows_shared(self.sharing, *self.models().values()):
                return library._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self.accelerator = accelerator

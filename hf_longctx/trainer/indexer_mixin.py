"""The trainers' overridden methods for the indexers of a sparse model; see [`IndexerTraining`]."""

from __future__ import annotations

import contextlib
from typing import Any

from ..adapters.sparse.sparse_rows import SparseRowsWatch
from ..config.indexer import IndexerConfig
from .indexer_checks import refuse_indexer_settings, refuse_own_scheduler
from .indexer_training import IndexerTraining
from .mixin import SequenceParallelMixin


class IndexerMixin(SequenceParallelMixin):
    """In front of a library's trainer class, like the mixin below; does nothing without `IndexerConfig(loss=...)`.

    Args:
        indexer ([`IndexerConfig`], *optional*): how the indexers of a sparse model are trained.
        kwargs: see [`SequenceParallelMixin`].
    """

    indexer: IndexerConfig
    optimizer: Any  # this and the next of the library's trainer
    state: Any
    _indexers: IndexerTraining | None = None
    _sparse_rows: SparseRowsWatch

    def prepare_model(self) -> None:
        super().prepare_model()
        self._sparse_rows = SparseRowsWatch(self.model)
        refuse_indexer_settings(self)
        if self.indexer.loss is None:
            return
        if self._indexers is None:
            self._indexers = IndexerTraining(self.indexer, self.model)
        else:
            self._indexers.prepare(self.model)

    def check_share(self, inputs: dict[str, Any]) -> None:
        # The checks look at the gradient of the model's own loss.
        with contextlib.nullcontext() if self._indexers is None else self._indexers.paused():
            super().check_share(inputs)
        self._sparse_rows.see(inputs["sequence_shard"].num_tokens)

    def _inner_training_loop(self, *args, **kwargs):
        library: Any = super()
        try:
            return library._inner_training_loop(*args, **kwargs)
        finally:
            if self._indexers is not None:
                self._indexers.end_run()

    def create_optimizer(self, *args, **kwargs):
        refuse_own_scheduler(self)
        library: Any = super()
        optimizer = library.create_optimizer(*args, **kwargs)
        if self._indexers is not None:
            self._indexers.split_groups(optimizer)
        return optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        library: Any = super()
        batches, count = library.get_batch_samples(epoch_iterator, num_batches, device)
        if self._indexers is not None and batches:
            self._indexers.begin_step(self.state.global_step, batches, self.mesh, device)
        return batches, count

    def _prepare_inputs(self, inputs):
        if self._indexers is not None:
            self._indexers.collect()
        library: Any = super()
        return library._prepare_inputs(inputs)

    def log(self, logs, *args, **kwargs):
        if self._indexers is not None and "loss" in logs:
            logs |= self._indexers.logs(self.optimizer)
        library: Any = super()
        return library.log(logs, *args, **kwargs)

"""Training the indexers of a sparse model next to the model itself: stages, weights, learning rates and the log.

The gradient comes from the layers ([`IndexerObjective`][hf_longctx.adapters.sparse.indexer_objective]); here is what
only a run knows: which stage a step belongs to, how many queries the step has, and which parameters are indexers'.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..adapters.sparse.indexer_objective import IndexerObjective, count_queries
from ..adapters.sparse.sparse_layers import first_queries, indexers_of, set_objective
from ..adapters.wrapped import unwrap
from ..attention.call_documents import TOKEN_NAMES, document_facts, shard_of_rows
from ..config.indexer import IndexerConfig


logger = logging.getLogger(__name__)


class IndexerTraining:
    """The indexers of one run.

    Args:
        config ([`IndexerConfig`]): with a loss.
        model (`torch.nn.Module`): wrapped or not, with its adapters.

    Raises:
        ValueError: the model has no indexer, or none that is trained.
    """

    def __init__(self, config: IndexerConfig, model: torch.nn.Module) -> None:
        self.config, self.objective = config, IndexerObjective()
        self._totals = torch.zeros(4)
        self._trained: dict[int, bool] = {}
        self.prepare(model)

    def prepare(self, model: torch.nn.Module) -> None:
        """Let the layers of `model` follow the objective, and remember what of it is trained."""
        self.model = unwrap(model)
        name = type(self.model).__name__
        parameters = self.parameters()
        if not parameters:
            raise ValueError(
                f"`IndexerConfig(loss={self.config.loss!r})` trains indexers, and `{name}` has none that pick single "
                "tokens or entries: leave `indexer` out."
            )
        if not any(parameter.requires_grad for parameter in parameters):
            raise ValueError(
                f"`IndexerConfig(loss={self.config.loss!r})` trains indexers, but all of those of `{name}` are "
                "frozen: set `requires_grad` on them, or leave `indexer` out."
            )
        self._trained = {id(parameter): parameter.requires_grad for parameter in self.model.parameters()}
        self._firsts = first_queries(self.model)
        set_objective(self.model, self.objective)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Of all indexers."""
        return [parameter for indexer in indexers_of(self.model) for parameter in indexer.parameters()]

    def split_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the indexers' parameters groups of their own, with their learning rate."""
        rate, known = self.config.indexer_learning_rate, {id(parameter) for parameter in self.parameters()}
        if rate is None:
            return
        for group in list(optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in known]
            if len(mine) == len(group["params"]):
                group["lr"] = rate
            elif mine:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
                optimizer.param_groups.append({**group, "params": mine, "lr": rate})

    def begin_step(self, step: int, batches: list, mesh, device: torch.device) -> None:
        """Choose the stage of an optimizer step, and count its queries.

        Args:
            step (`int`): steps that were finished before.
            batches (`list`): of this rank, all of the step.
            mesh ([`SequenceMesh`]): the axes of the run.

        Communication: one all-reduce of a few numbers.
        """
        self._enter(self.config.is_dense_at(step))
        counts = torch.tensor([_count(batches, first) for first in self._firsts], dtype=torch.float64, device=device)
        if mesh.world_size > 1:
            dist.all_reduce(counts)
        totals = (counts / mesh.sequence_parallel_size).clamp(min=1).tolist()
        factor = self.config.indexer_coefficient * mesh.world_size
        self.objective.weights = {first: factor / total for first, total in zip(self._firsts, totals)}

    def end_run(self) -> None:
        """Add nothing from now on, and let what was frozen for a stage be trained again."""
        self.objective.weights = {}
        self._enter(False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which layers add nothing, for checks that look at the model's own gradient."""
        weights, self.objective.weights = self.objective.weights, {}
        try:
            yield
        finally:
            self.objective.weights = weights

    def collect(self) -> None:
        """Add what the layers of the last forward found to what will be logged."""
        found = self.objective.take_found()
        self._totals = self._totals.to(found.device, found.dtype) + found

    def logs(self, optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
        """Divergence a query and share of attention in the picks since the last call, over all ranks.

        Communication: one all-reduce of four numbers.
        """
        self.collect()
        totals, self._totals = self._totals.double(), torch.zeros(4)
        if dist.is_available() and dist.is_initialized():
            totals = totals.to(next(self.model.parameters()).device)
            dist.all_reduce(totals)
        divergence, queries, held, sampled = totals.tolist()
        logs = {"indexer_kl": divergence / queries} if queries else {}
        if sampled:
            logs["indexer_recall"] = held / sampled
        known = {id(parameter) for parameter in self.parameters()}
        for group in optimizer.param_groups if optimizer is not None and self.config.indexer_learning_rate else ():
            if any(id(parameter) in known for parameter in group["params"]):
                logs["indexer_learning_rate"] = group["lr"]
        return logs

    def _enter(self, is_dense: bool) -> None:
        """Freeze everything but the indexers in a dense stage, and undo it after one."""
        if is_dense != self.objective.is_dense:
            logger.info("indexers: %s stage", "dense" if is_dense else "sparse")
        self.objective.is_dense = is_dense
        known = {id(parameter) for parameter in self.parameters()}
        for parameter in self.model.parameters():
            trained = self._trained.get(id(parameter), parameter.requires_grad)
            parameter.requires_grad_(trained and (not is_dense or id(parameter) in known))


def _count(batches: list, first: int) -> int:
    """The queries of some batches that stand at `first` in their document or later."""
    count = 0
    for batch in batches:
        shard = batch.get("sequence_shard")
        tokens = next(batch[name] for name in TOKEN_NAMES if batch.get(name) is not None)
        rows, num_tokens = tokens.shape[:2]
        if shard is None:
            facts = {**document_facts(batch, num_tokens), "attention_mask": batch.get("attention_mask")}
            shard = shard_of_rows(facts, rows, num_tokens, tokens.device)
        count += count_queries(shard.segment_ids, rows, shard.num_tokens, first)
    return count

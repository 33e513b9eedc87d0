"""The proof of embedding models: texts packed in one row, and rows that ranks share, against the padded model.

The reference is sentence-transformers as anyone runs it: one process, padded rows, its own attention. `packed` is
the same model on one process without padding, `shared` on all ranks, each with a share of every row. All of them get
texts through its own tokenizing, and are compared by embeddings, the loss of multiple negatives and every
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from ..adapters.instance_forward import put_on
from ..embedding.packed_model import pack_embeddings, shared_rows
from ..embedding.tiled_ranking_loss import TiledMultipleNegativesRankingLoss
from ..families import length_rope
from ..parallel.mesh import SequenceMesh
from .embedder import TEXTS_OF_A_GROUP, OneByOne, build_embedder, num_modes_of, num_tokens_of, texts_of_group
from .embedding_numbers import (
    compare_embeddings,
    embed,
    embeddings_without_communication,
    sees_later_tokens,
    train,
    train_on_ranks,
)
from .model_under_test import ModelUnderTest, Setting
from .numbers import Numbers, relative, wrap
from .outcomes import SENSITIVE, Outcome, attempt, first_line, least_of_ranks, worst_of_ranks
from .result import UNBUILDABLE, RowsResult, judge, tolerance
from .tiny import CannotShrink


ATTENTION = {"packed": "packed", "shared": "ulysses"}


class EmbeddingPair:
    """One padded model in one process, and the same one packed and shared.

    Raises:
        Outcome: one process cannot run it.
    """

    def __init__(self, tested: ModelUnderTest, setting: Setting, dtype: str) -> None:
        self.tested, self.setting, self.dtype = tested, setting, dtype
        self.groups = [texts_of_group(group) for group in range(setting.data_parallel_size)]
        self.columns: list[list[str]] = [sum(columns, []) for columns in zip(*self.groups)]
        self.num_modes = num_modes_of(tested)
        self.unsharded, self.numbers = self._run_reference()
        self.mesh = SequenceMesh.build(setting.sequence_parallel_size)

    def prove(self, kind: str, rounded: Numbers | None = None) -> RowsResult:
        """Numbers of one kind of rows, and the outcome; `rounded`: the reference's in less precision."""
        model = attempt(lambda: self._load(kind), ATTENTION[kind], "leave it padded, with attn_implementation='sdpa'")
        attempt(lambda: self._pack(model, kind))
        baseline = self._baseline_error(model, kind)
        ours = attempt(lambda: self._packed(model) if kind == "packed" else self._shared(model))
        first = TEXTS_OF_A_GROUP * self._group(kind)
        errors = worst_of_ranks(compare_embeddings(ours, self.numbers, first, self.num_modes))
        measured = 0.0 if rounded is None else self._distance(rounded)
        return judge(kind, errors, self.dtype, self.num_tokens(kind), baseline, measured)

    def rounding_of(self, rounded: EmbeddingPair, kind: str) -> float:
        """How far the reference in less precision is from this one."""
        return self._distance(rounded.reference(kind))

    def num_tokens(self, kind: str) -> int:
        """Of all texts."""
        return num_tokens_of(self.unsharded, sum(self.columns, []))

    def reference(self, kind: str) -> Numbers:
        """The reference's numbers: the same for both kinds."""
        return self.numbers

    def _distance(self, rounded: Numbers) -> float:
        return compare_embeddings(rounded, self.numbers, 0, self.num_modes).worst

    def _group(self, kind: str) -> int:
        """Whose texts come first in what this rank embeds."""
        return self.mesh.data_parallel_rank if kind == "shared" else 0

    def _run_reference(self) -> tuple[SentenceTransformer, Numbers]:
        if self.tested.config is None:
            raise Outcome(UNBUILDABLE, self.tested.problem)
        try:
            model = build_embedder(self.tested, None, getattr(torch, self.dtype))
            if length_rope(self.tested.config.get_text_config()) is not None:
                put_on(model[0], OneByOne())
            embeddings = torch.cat([embed(model, columns) for columns in self.groups])
            numbers = train(MultipleNegativesRankingLoss(model), model, self.columns, embeddings)
        except CannotShrink as error:
            raise Outcome(UNBUILDABLE, str(error)) from error
        except Exception as error:
            raise Outcome(UNBUILDABLE, f"one process cannot run padded rows on it: {first_line(error)}") from error
        if not numbers.is_finite:
            raise Outcome(UNBUILDABLE, "one process gets numbers that are not finite from padded rows")
        self._check_direction(model)
        return model, numbers

    def _check_direction(self, model: SentenceTransformer) -> None:
        """A model that was asked to look both ways does."""
        first, second, third, *_ = self.columns[1][0].split()  # two words, since a window may be short
        config: Any = self.tested.config
        if getattr(config.get_text_config(), "is_causal", None) is not False:
            return
        if not sees_later_tokens(model, first, second, third):
            raise Outcome(
                UNBUILDABLE,
                "transformers keeps its causal mask even with `is_causal` False in the configuration: leave "
                "`bidirectional` off",
            )

    def _load(self, kind: str) -> SentenceTransformer:
        model = build_embedder(self.tested, ATTENTION[kind], getattr(torch, self.dtype))
        model.load_state_dict(self.unsharded.state_dict())
        return model

    def _pack(self, model: SentenceTransformer, kind: str) -> None:
        """As a trainer does: prove it on rows as training has them, and leave each process its own rows."""
        if kind == "shared":
            pack_embeddings(model, self.mesh, inner_attention=self.setting.inner_attention)
        pack_embeddings(model, prove=kind == "packed")

    def _packed(self, model: SentenceTransformer) -> Numbers:
        embeddings = torch.cat([embed(model, columns) for columns in self.groups])
        return train(MultipleNegativesRankingLoss(model), model, self.columns, embeddings)

    def _shared(self, model: SentenceTransformer) -> Numbers:
        """Each group has its own texts; negatives are those of all groups."""
        columns, wrapper = self.groups[self.mesh.data_parallel_rank], self.setting.wrapper
        with shared_rows(model, self.mesh, self.setting.inner_attention):
            embeddings = embed(model, columns)
            if self.setting.data_parallel_size == 1:
                loss = MultipleNegativesRankingLoss(model)
            else:
                loss = TiledMultipleNegativesRankingLoss(model, mini_batch_size=None, mesh=self.mesh)
            loss.model = wrap(model, wrapper)  # as sentence-transformers' trainer does
            return train_on_ranks(loss, model, columns, embeddings, wrapper)

    def _baseline_error(self, model: SentenceTransformer, kind: str) -> float:
        """How far documents are off if texts see each other, or if ranks exchange nothing."""
        documents, rank, size, group = self.groups[self._group(kind)][1], 0, 1, None
        if kind == "shared":
            mesh = self.mesh
            rank, size, group = mesh.sequence_parallel_rank, mesh.sequence_parallel_size, mesh.sp_group
        last = TEXTS_OF_A_GROUP * (self._group(kind) + 1)
        expected = self.numbers.outputs[last - len(documents) : last]
        embeddings = attempt(lambda: embeddings_without_communication(model, documents, group, rank, size))
        error = least_of_ranks(relative(embeddings, expected))
        if error < SENSITIVE * tolerance(self.num_tokens(kind)):
            without = "texts that see each other" if size == 1 else "ranks that do not exchange anything"
            raise Outcome(
                UNBUILDABLE,
                f"{without} differ by {error:.1e} only, so no comparison of this model shows whether they do",
            )
        return error

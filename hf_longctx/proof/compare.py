"""What every rank does: build both models, ask the trainers' own checks, compare, and decide.

The order is that of a training run: what transformers cannot build says nothing about us; then what the trainers would
refuse before their first step is refused here by the same code; only what they would train is compared.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from ..adapters.instance_forward import patch_on
from ..adapters.loop_batches import LOOP_BATCHES
from ..attention.contamination import assert_no_cross_document
from ..config.run import LongContextConfig
from ..families import pads_left, text_marks
from ..parallel.mesh import SequenceMesh
from ..trainer.adaptation import adapt
from ..trainer.checks import check_model
from ..trainer.sanity_check import SanityResult
from .build import build_model, sharded_model_on_meta
from .chunk_noise import other_chunks
from .full_attention import distance_to_full_attention
from .model_under_test import ModelUnderTest, Setting
from .numbers import Numbers, compare, of_one_process, on_the_ranks, outputs_without_communication, relative, wrap
from .outcomes import SENSITIVE, Outcome, attempt, first_line, least_of_ranks, worst_of_ranks
from .random_rows import ROWS_OF_A_GROUP, Rows, make_rows, num_tokens_of
from .result import REFUSED, UNBUILDABLE, WRONG, Errors, RowsResult, judge, tolerance
from .tiny import FIRST_TOKEN


# The same numbers by the same operations, on one process.
_SAME = 1e-6


def prove(tested: ModelUnderTest, setting: Setting) -> list[RowsResult]:
    """The outcome on each kind of rows. Every rank of a world of `setting.world_size` calls this."""
    results: list[RowsResult] = []
    pairs: dict[str, Any] = {}
    for kind in setting.kinds:
        began = time.perf_counter()
        try:
            result = _prove_kind(tested, setting, kind, pairs)
        except Outcome as ended:
            result = RowsResult(kind, ended.outcome, dtype=setting.dtype, message=ended.message)
        results.append(dataclasses.replace(result, seconds=time.perf_counter() - began))
    return results


def _prove_kind(tested: ModelUnderTest, setting: Setting, kind: str, pairs: dict) -> RowsResult:
    pair = _pair_of(tested, setting, setting.dtype, pairs)
    result = pair.prove(kind)
    if result.outcome != WRONG or result.errors is None or setting.dtype != "float32":
        return result
    # Rounding, or a router's near tie that it decided, is gone in float64; a defect is not.
    precise = None
    try:
        precise = _pair_of(tested, setting, "float64", pairs)
        return precise.prove(kind, pair.reference(kind))
    except Outcome as ended:
        # Some models' masks overflow there; then rounding in float32 is measured on the reference implementation.
        measured = 0.0 if precise is None else precise.rounding_of(pair, kind)
        again = judge(kind, result.errors, "float32", pair.num_tokens(kind), result.baseline, measured)
        if again.outcome == WRONG:
            return dataclasses.replace(again, message=f"{again.message} In float64: {ended}")
        return again


def _pair_of(tested: ModelUnderTest, setting: Setting, dtype: str, pairs: dict) -> Pair:
    """Both models in one precision, built once; a failure is kept as well."""
    if dtype not in pairs:
        try:
            pairs[dtype] = _pair_class(tested)(tested, setting, dtype)
        except Outcome as ended:
            pairs[dtype] = ended
    if isinstance(pairs[dtype], Outcome):
        raise pairs[dtype]
    return pairs[dtype]


def _pair_class(tested: ModelUnderTest) -> type:
    if tested.task == "embedding":
        from .embedding_pair import EmbeddingPair  # needs sentence-transformers

        return EmbeddingPair
    if tested.task in ("dpo", "reward"):
        from .whole_rows_pair import WholeRowsPair  # needs TRL and PEFT

        return WholeRowsPair
    return Pair


class Pair:
    """One model in one process and the same one on all ranks.

    Raises:
        Outcome: one process cannot run it.
    """

    def __init__(self, tested: ModelUnderTest, setting: Setting, dtype: str) -> None:
        self.tested, self.setting, self.dtype = tested, setting, dtype
        self.unsharded = self._unsharded_model()
        text: Any = self.unsharded.config.get_text_config()
        if not hasattr(text, "vocab_size"):
            raise Outcome(UNBUILDABLE, "its configuration has no `vocab_size`, so it reads more than rows of tokens")
        self.vocabulary = text.vocab_size
        self.references: dict[str, Numbers] = {}
        self.needs = SanityResult()
        self.start: int | None = 0
        self.reference("dense")  # before anything of ours, so that a failure of transformers is not counted as ours
        self.ended: Outcome | None = None
        self.model: torch.nn.Module | None = None

    def prepare(self) -> None:
        """Build ours and ask the trainers' checks, once; a refusal is kept."""
        if self.ended is None and self.model is None:
            try:
                self._prepare()
            except Outcome as ended:
                self.ended = ended
        if self.ended is not None:
            raise self.ended

    def _prepare(self) -> None:
        tested, setting, dtype = self.tested, self.setting, self.dtype
        self.mesh = SequenceMesh.build(setting.sequence_parallel_size)
        self.model = attempt(lambda: build_model(tested, "ulysses", getattr(torch, dtype)), attention="ulysses")
        self.model.load_state_dict(self.unsharded.state_dict())
        self.needs = attempt(self._check)
        if self.needs.needs_position_ids:
            self.start = self._first_position()
        self.references.clear()
        self.baseline = self._baseline_error()
        self.wrapped = wrap(self.model, setting.wrapper)

    def prove(self, kind: str, rounded: Numbers | None = None) -> RowsResult:
        """Numbers of one kind of rows, and the outcome; `rounded`: the reference's in less precision."""
        self.prepare()
        rows, theirs = self.rows(kind), self.reference(kind)
        if kind == "packed":
            attempt(lambda: self._check_documents(rows))
        ours = attempt(lambda: self.on_the_ranks(kind))
        errors = compare(ours, theirs, self.mesh.data_parallel_rank * ROWS_OF_A_GROUP)
        measured = 0.0 if rounded is None else compare(rounded, theirs, 0).worst
        errors = worst_of_ranks(errors)
        result = judge(kind, errors, self.dtype, self.num_tokens(kind), self.baseline, measured)
        result = dataclasses.replace(result, full_attention=self._full_attention(rows, theirs))
        return result if result.outcome != WRONG else self._with_noise(result, errors, measured)

    def _full_attention(self, rows: Rows, theirs: Numbers) -> float | None:
        return distance_to_full_attention(self.unsharded, self.tested.task, rows, theirs)

    def _with_noise(self, result: RowsResult, errors: Errors, measured: float) -> RowsResult:
        """The outcome by what rounding makes of one process, where its layers run in chunks and cast inside."""
        theirs = self.reference(result.rows)
        with other_chunks(self.alone(result.rows)) as has_chunks:
            if not has_chunks:
                return result
            again = self.of_one_process(result.rows)
        noise = least_of_ranks(compare(again, theirs, 0).worst)
        allowed, tokens = max(measured, noise), self.num_tokens(result.rows)
        judged = judge(result.rows, errors, self.dtype, tokens, self.baseline, allowed)
        return dataclasses.replace(judged, noise=noise)

    def rounding_of(self, rounded: Pair, kind: str) -> float:
        """How far the reference in less precision is from this one; 0 where this one has no numbers."""
        self.needs, self.start = rounded.needs, rounded.start
        self.references.clear()
        try:
            return compare(rounded.reference(kind), self.reference(kind), 0).worst
        except Outcome:
            return 0.0

    # What a pair of another task computes in its own way

    def alone(self, kind: str) -> torch.nn.Module:
        """The model of one process."""
        return self.unsharded

    def of_one_process(self, kind: str) -> Numbers:
        return of_one_process(self.unsharded, self.tested.task, self.rows(kind))

    def on_the_ranks(self, kind: str) -> Numbers:
        return on_the_ranks(self.wrapped, self.tested.task, self.rows(kind), self.mesh, self.setting)

    def num_tokens(self, kind: str) -> int:
        """Of all rows."""
        return self.rows(kind).batch["input_ids"].numel()

    def rows(self, kind: str, may_pad_left: bool = True) -> Rows:
        first = min(FIRST_TOKEN, self.vocabulary // 2)
        tokens = num_tokens_of(kind, self.setting.sequence_parallel_size)
        settings = (self.vocabulary, self.setting.data_parallel_size, tokens, first)
        left = may_pad_left and pads_left(self.tested.config)
        rows = make_rows(kind, self.tested.task, *settings, self.tested.shifts_labels, left)
        ids = rows.batch["input_ids"]
        rows = dataclasses.replace(rows, batch={**rows.batch, **text_marks(self.unsharded.config, ids)})
        if self.needs.needs_position_ids:
            rows = rows.with_positions(self.start)
        return rows.without_padding_targets() if self.needs.padding_predicts else rows

    def reference(self, kind: str) -> Numbers:
        """The reference's numbers, computed once."""
        if kind not in self.references:
            try:
                numbers = self.of_one_process(kind)
            except Exception as error:
                raise Outcome(UNBUILDABLE, f"one process cannot run {kind} rows on it: {first_line(error)}") from error
            if not numbers.is_finite:
                raise Outcome(UNBUILDABLE, f"one process gets numbers that are not finite from {kind} rows")
            self.references[kind] = numbers
        return self.references[kind]

    def _unsharded_model(self) -> torch.nn.Module:
        tested = self.tested
        problem = tested.problem
        if tested.config is not None:
            try:
                return build_model(tested, None, getattr(torch, self.dtype))
            except Exception as error:
                problem = first_line(error)
        _refuse_by_configuration(tested, self.setting)
        raise Outcome(UNBUILDABLE, problem)

    def _first_position(self) -> int | None:
        """What the model counts from, if it counts up by one: RoBERTa and similar models from `pad_token_id + 1`."""
        expected = self.reference("dense").outputs
        rows = self.rows("dense")
        padding = getattr(self.unsharded.config.get_text_config(), "pad_token_id", None) or 0
        for start in (0, padding + 1):
            explicit = dataclasses.replace(rows.with_positions(start), counts_itself=False)
            outputs = of_one_process(self.unsharded, self.tested.task, explicit).outputs
            if relative(outputs, expected) <= _SAME:
                return start
        return None

    def _check(self) -> SanityResult:
        """What a loop does before its first step, and a trainer in the same way."""
        adapt(self.model, self.mesh, inner_attention=self.setting.inner_attention)
        return patch_on(self.model, LOOP_BATCHES).needs

    def _check_documents(self, rows: Rows) -> None:
        batch = rows.of_group(self.mesh.data_parallel_rank)
        inner, checks = self.setting.inner_attention, self.setting.wrapper == "none"
        try:
            assert_no_cross_document(self.model, batch, self.mesh, inner_attention=inner, check_gradients=checks)
        except AssertionError as error:
            raise NotImplementedError(f"`{type(self.model).__name__}` cannot train on packed rows: {error}") from error

    def _baseline_error(self) -> float | None:
        if self.setting.sequence_parallel_size == 1:
            return None
        rows, expected = self.rows("dense"), self.reference("dense").outputs
        outputs = attempt(
            lambda: outputs_without_communication(self.model, self.tested.task, rows, self.mesh, self.setting)
        )
        first = self.mesh.data_parallel_rank * ROWS_OF_A_GROUP
        error = relative(outputs, expected[first : first + len(outputs)])
        if error < SENSITIVE * tolerance(rows.batch["input_ids"].numel()):
            raise Outcome(
                UNBUILDABLE,
                f"ranks that do not exchange anything differ by {error:.1e} only, so no comparison of this model "
                "shows whether they do",
            )
        return error


def _refuse_by_configuration(tested: ModelUnderTest, setting: Setting) -> None:
    """A model that has no tiny version may still be refused by what its own configuration says."""
    config = LongContextConfig(
        sequence_parallel_size=setting.sequence_parallel_size, inner_attention=setting.inner_attention
    )
    try:
        model = sharded_model_on_meta(tested)
    except Exception:
        return
    try:
        check_model(model, config)
    except (NotImplementedError, ValueError) as error:
        raise Outcome(REFUSED, " ".join(str(error).split())) from error

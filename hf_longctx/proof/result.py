"""What a proof says: numbers of every kind of rows, and one outcome.

`exact`: every number is that of one process up to rounding. `wrong`: one is not. `refused`: the package says in a
message, before any step, why it would not be. `unbuildable`: there is nothing to compare with.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


EXACT, WRONG, REFUSED, UNBUILDABLE = "exact", "wrong", "refused", "unbuildable"
EXIT_CODES = {EXACT: 0, WRONG: 1, REFUSED: 2, UNBUILDABLE: 3}
WORST_FIRST = (WRONG, UNBUILDABLE, REFUSED, EXACT)
_EPSILON = 2.0**-23
_MOST = 1e-3


@dataclass(frozen=True)
class Errors:
    """Differences from one process, each relative to the largest entry of what it is compared with.

    Args:
        loss (`float`): of the training loss.
        logits (`float`): of the outputs of all real tokens, or of all embeddings.
        gradient (`float`): of the worst parameter; relative to the largest entry of its module's gradients, or to a
            thousandth of the largest of all, whichever is more.
        parameter (`str`): its name.
        evaluation (`float`): of the loss in evaluation mode.
    """

    loss: float
    logits: float
    gradient: float
    parameter: str
    evaluation: float

    @property
    def worst(self) -> float:
        """The largest; infinite where a number is not one."""
        values = (self.loss, self.logits, self.gradient, self.evaluation)
        return max(value if math.isfinite(value) else math.inf for value in values)


def tolerance(num_tokens: int) -> float:
    """What rounding may leave, relative to the largest entry.

    A gradient is a sum over all tokens that several ranks take in another order: a sum of `n` terms moves by at most
    `n` units of rounding. In float64 the same is allowed, since models cast norms, softmax and the loss to float32
    inside; but there it is hardly ever used, and what rounding made of near ties is gone.
    """
    return num_tokens * _EPSILON


@dataclass(frozen=True)
class RowsResult:
    """One kind of rows.

    Args:
        rows (`str`): `"dense"`, `"even"`, `"padded"` or `"packed"`; of embeddings, `"packed"` or `"shared"`.
        outcome (`str`): see above.
        errors ([`Errors`], *optional*): `None` where nothing was compared.
        tolerance (`float`, *optional*): what was allowed.
        dtype (`str`): in which the outcome was reached: float64 where float32 exceeded its tolerance.
        baseline (`float`, *optional*): error of the outputs without communication, or of embeddings of texts that see
            each other, which shows that the proof could see one.
        message (`str`): why, for an outcome other than exact; else empty.
        seconds (`float`): of this kind.
        noise (`float`, *optional*): how far one process is from itself where its recurrences run in smaller chunks;
            measured where the tolerance did not do.
        full_attention (`float`, *optional*): how far the outputs of LSH attention are from those of full attention
            with the same weights. It decides nothing.
    """

    rows: str
    outcome: str
    errors: Errors | None = None
    tolerance: float | None = None
    dtype: str = "float32"
    baseline: float | None = None
    message: str = ""
    seconds: float = 0.0
    noise: float | None = None
    full_attention: float | None = None


@dataclass(frozen=True)
class VerifyResult:
    """What [`verify`] found. True in a condition exactly if it is exact.

    Args:
        model (`str`): model type.
        task (`str`): `"causal-lm"`, `"masked-lm"`, `"multimodal-lm"`, `"encoder"` or `"embedding"`.
        world_size (`int`): processes.
        sequence_parallel_size (`int`): that share a row.
        rows (`tuple[RowsResult, ...]`): each kind of rows.
        seconds (`float`): in all, from the call on.
    """

    model: str
    task: str
    world_size: int
    sequence_parallel_size: int
    rows: tuple[RowsResult, ...]
    seconds: float = 0.0

    @property
    def outcome(self) -> str:
        """The worst of all rows: wrong, unbuildable, refused, exact."""
        return min((rows.outcome for rows in self.rows), key=WORST_FIRST.index)

    @property
    def exit_code(self) -> int:
        """0 exact, 1 wrong, 2 refused, 3 could not be built."""
        return EXIT_CODES[self.outcome]

    @property
    def message(self) -> str:
        """Why it is not exact; empty if it is."""
        return next((rows.message for rows in self.rows if rows.outcome == self.outcome), "")

    @property
    def loss_error(self) -> float:
        """The largest of all rows, relative; not a number if nothing was compared."""
        return max((errors.loss for errors in self._compared), default=math.nan)

    @property
    def logits_error(self) -> float:
        return max((errors.logits for errors in self._compared), default=math.nan)

    @property
    def evaluation_error(self) -> float:
        return max((errors.evaluation for errors in self._compared), default=math.nan)

    @property
    def worst_gradient(self) -> float:
        return max((errors.gradient for errors in self._compared), default=math.nan)

    @property
    def worst_parameter(self) -> str:
        """Whose gradient differs most."""
        return max(self._compared, key=lambda errors: errors.gradient).parameter if self._compared else ""

    @property
    def _compared(self) -> list[Errors]:
        return [rows.errors for rows in self.rows if rows.errors is not None]

    def __bool__(self) -> bool:
        return self.outcome == EXACT

    def raise_unless_exact(self) -> VerifyResult:
        """Itself, or an `AssertionError` with the message."""
        if not self:
            raise AssertionError(f"`{self.model}` is {self.outcome}, not exact: {self.message}")
        return self

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON: what stands above, the rows included. Numbers that are not finite become `None`."""
        summary = {
            name: getattr(self, name)
            for name in ("outcome", "exit_code", "message", "loss_error", "logits_error", "worst_gradient")
        }
        summary |= {"worst_parameter": self.worst_parameter, "evaluation_error": self.evaluation_error}
        return _finite({**asdict(self), **summary})


def judge(
    rows: str, errors: Errors, dtype: str, num_tokens: int, baseline: float | None = None, measured: float = 0.0
) -> RowsResult:
    """The outcome on numbers of one precision.

    Args:
        measured (`float`): how far one process is from itself, in float64 or with other chunks of a recurrence. A
            model that casts inside leaves as much on either side, so twice that is allowed where it is more, but never
            over a thousandth.
    """
    allowed = max(tolerance(num_tokens), min(2 * measured, _MOST))
    if errors.worst <= allowed:
        return RowsResult(rows, EXACT, errors, allowed, dtype, baseline)
    shown = {
        "the loss": errors.loss,
        "the outputs": errors.logits,
        f"the gradient of `{errors.parameter}`": errors.gradient,
        "the loss in evaluation": errors.evaluation,
    }
    names = [name for name, value in shown.items() if not value <= allowed]
    message = (
        f"in {rows} rows {', '.join(names)} differ from one process by up to {errors.worst:.1e} of the largest "
        f"entry in {dtype}, where rounding leaves at most {allowed:.1e}: please report it with this table."
    )
    return RowsResult(rows, WRONG, errors, allowed, dtype, baseline, message)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

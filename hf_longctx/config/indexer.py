"""`IndexerConfig`: how the indexers of a sparse model are trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from .values import is_number, validate_choice


INDEXER_LOSSES = ("dense", "sparse")


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """How the indexers of a sparse model are trained: what they pick is what attention weighs.

    Args:
        loss (`str`, *optional*):
            `"dense"`: indexers learn from attention to all tokens, under which the model runs; everything else is
            frozen. `"sparse"`: from attention to the tokens that they pick, while the rest of the model trains on its
            own loss. Unset: indexers get no gradient, as in transformers.
        dense_steps (`int`, *optional*):
            With `loss="dense"`: optimizer steps after which the run goes on with `"sparse"`. Unset: none does.
        indexer_learning_rate (`float`, *optional*):
            Peak learning rate of the indexers' parameters. Unset: that of the model.
        indexer_coefficient (`float`, *optional*, defaults to 1.0):
            Factor of the loss of the indexers. It is logged as `indexer_kl`, and is no part of `loss`.

    Raises:
        ValueError: a field has a value that no run could use, or one without the loss that it belongs to.
    """

    loss: str | None = field(
        default=None,
        metadata={"help": "What indexers learn from: attention to all tokens (dense) or to those picked (sparse)."},
    )
    dense_steps: int | None = field(
        default=None, metadata={"help": "Steps with `loss` dense after which the run goes on with sparse."}
    )
    indexer_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the indexers; unset: that of the model."}
    )
    indexer_coefficient: float = field(default=1.0, metadata={"help": "Factor of the loss of the indexers."})

    def __post_init__(self) -> None:
        if self.loss is not None:
            validate_choice("loss", self.loss, INDEXER_LOSSES)
        steps = self.dense_steps
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"`dense_steps` ({steps!r}) must be a positive number of steps, or unset.")
        if self.dense_steps is not None and self.loss != "dense":
            raise ValueError(
                f"`dense_steps` ({self.dense_steps}) counts steps with `loss` 'dense', but `loss` is {self.loss!r}: "
                "set `loss='dense'`, or leave it out."
            )
        for name in ("indexer_learning_rate", "indexer_coefficient"):
            value = getattr(self, name)
            unset = value is None and name == "indexer_learning_rate"
            if not unset and not (is_number(value) and value > 0):
                raise ValueError(f"`{name}` ({value!r}) must be a number above 0, or left out.")
            if self.loss is None and value is not None and value != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}` ({value}) is set, but without `loss` indexers get no gradient: set `loss='dense'` or "
                    "`loss='sparse'`, or leave it out."
                )

    def is_dense_at(self, step: int) -> bool:
        """Whether the optimizer step after `step` finished ones is a dense one."""
        return self.loss == "dense" and (self.dense_steps is None or step < self.dense_steps)

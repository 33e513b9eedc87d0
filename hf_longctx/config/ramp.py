"""`RampConfig`: a global batch that grows over the first rows of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RampConfig:
    """A global batch that grows from `start` to that of the training arguments over the first `rows` rows.

    It grows by accumulating more micro-batches, in equal shares of `rows`; the learning rate follows the rows that
    were trained, as if every step had had the whole batch. The three are set together, or none is.

    Args:
        start (`int`, *optional*):
            Rows of the first global batch. Unset: no ramp.
        increment (`int`, *optional*):
            Rows by which the global batch grows. Like `start`, a multiple of the rows that all groups draw at once
            (`per_device_train_batch_size` times groups).
        rows (`int`, *optional*):
            Rows after which the global batch is whole.

    Raises:
        ValueError: a field has a value that no run could use, or only some of them are set.
    """

    start: int | None = field(
        default=None,
        metadata={"help": "Batch ramp: rows of the first global batch; unset: no ramp.", "aliases": ["--ramp_start"]},
    )
    increment: int | None = field(
        default=None,
        metadata={"help": "Batch ramp: rows by which the global batch grows.", "aliases": ["--ramp_increment"]},
    )
    rows: int | None = field(
        default=None,
        metadata={"help": "Batch ramp: rows after which the batch is whole.", "aliases": ["--ramp_rows"]},
    )

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in ("start", "increment", "rows")}
        for name, value in values.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` ({value!r}) must be a positive number of rows, or unset: no ramp.")
        missing = [f"`{name}`" for name, value in values.items() if value is None]
        if 0 < len(missing) < len(values):
            raise ValueError(
                f"a batch ramp needs `start`, `increment` and `rows`, and {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} unset: set all three, or none."
            )

    @property
    def is_on(self) -> bool:
        """Whether there is a ramp."""
        return self.start is not None

"""`PreferenceConfig`: how the rows of preference pairs are laid out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """How the rows of preference pairs are laid out.

    Args:
        flatten_rows (`bool`, *optional*, defaults to `False`):
            Leave the padding of a batch out of the model: its rows run as the documents of one row. Exact, and less
            work where the answers of a pair, or the pairs of a batch, differ in length. The model must run
            `"packed"` or `"ulysses"`.

    Raises:
        ValueError: a field has a value that no run could use.
    """

    flatten_rows: bool = field(
        default=False, metadata={"help": "Run the rows of a batch without padding, as documents of one row."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.flatten_rows, bool):
            raise ValueError(f"`flatten_rows` ({self.flatten_rows!r}) must be true or false.")

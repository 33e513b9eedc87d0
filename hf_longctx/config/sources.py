"""`SourcesConfig`: which rows of several sources make a batch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from .values import is_number, validate_tokens


def read_mapping(name: str, value: object) -> object:
    """A mapping as it is, or read from the JSON text that a command line gives."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'`{name}` ({value!r}) is no JSON object: write it like \'{{"nli": 1, "docs": 4}}\'.'
        ) from error


def validate_sources_by_name(name: str, value: object, *, whole: bool) -> None:
    """Raise `ValueError` unless `value` is `None` or maps names of sources to numbers over 0."""
    if value is None:
        return
    if not isinstance(value, dict) or not value:
        raise ValueError(f"`{name}` ({value!r}) must map at least one name of a source to a number, or be unset.")
    for source, number in value.items():
        if not is_number(number) or number <= 0 or (whole and number != int(number)):
            kind = "a whole number of rows, at least 1" if whole else "a number over 0"
            raise ValueError(
                f"`{name}` gives the source `{source}` {number!r}, but it must be {kind}: leave out of the data sets "
                "what shall not be drawn."
            )


@dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """Which rows of several sources make a batch.

    Args:
        source_weights (`dict[str, float]`, *optional*):
            How often each source is drawn, relative to the others. Unset: as often as it has rows.
        source_temperature (`float`, *optional*):
            Instead of weights: a source of `n` rows is drawn as often as `n ** (1 / source_temperature)`.
        source_caps (`dict[str, int]`, *optional*):
            At most so many rows of a source are ever used, always the same ones.
        sources_per_batch (`int`, *optional*, defaults to 1):
            Sources that fill equal shares of a global batch.
        swap_probability (`float`, *optional*, defaults to 0.0):
            How often the two texts of all pairs of a global batch are swapped.
        deduplicate (`bool`, *optional*, defaults to `False`):
            No two rows of a global batch share a text; a row that would is deferred to the next batch of its source.
            Every rank then reads the texts of all.
        balance_by (`str`, *optional*):
            Assign the rows of a global batch so that ranks have like work: the column with the tokens of a row, or
            `"characters"`. Every rank then reads the lengths of all.
        tokens_per_rank (`int`, *optional*):
            Fill every rank up to so many tokens instead of a number of rows.

    Raises:
        ValueError: a field has a value that no run could use.
    """

    source_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "How often each source is drawn, as JSON; unset: as often as it has rows."}
    )
    source_temperature: float | None = field(
        default=None, metadata={"help": "Draw a source of n rows as often as n ** (1 / source_temperature)."}
    )
    source_caps: dict[str, int] | str | None = field(
        default=None, metadata={"help": "At most so many rows of a source are ever used, as JSON."}
    )
    sources_per_batch: int = field(default=1, metadata={"help": "Sources that share a global batch equally."})
    swap_probability: float = field(
        default=0.0, metadata={"help": "How often the two texts of the pairs of a global batch are swapped."}
    )
    deduplicate: bool = field(default=False, metadata={"help": "No two rows of a global batch share a text."})
    balance_by: str | None = field(
        default=None, metadata={"help": "Column with the tokens of a row, or characters: ranks get like work."}
    )
    tokens_per_rank: int | None = field(
        default=None, metadata={"help": "Tokens that fill every rank, instead of a number of rows."}
    )

    def __post_init__(self) -> None:
        for name in ("source_weights", "source_caps"):
            object.__setattr__(self, name, read_mapping(name, getattr(self, name)))  # frozen, and from a command line
            validate_sources_by_name(name, getattr(self, name), whole=name == "source_caps")
        temperature, swap, shares = self.source_temperature, self.swap_probability, self.sources_per_batch
        if temperature is not None and (not is_number(temperature) or temperature <= 0):
            raise ValueError(
                f"`source_temperature` ({temperature!r}) must be a number over 0: 1 draws sources by their rows, more "
                "draws them more evenly."
            )
        if temperature is not None and self.source_weights is not None:
            raise ValueError(
                f"`source_weights` and `source_temperature` ({temperature!r}) both say how often a source is drawn: "
                "set one of them."
            )
        if not isinstance(shares, int) or isinstance(shares, bool) or shares < 1:
            raise ValueError(f"`sources_per_batch` ({shares!r}) must be a whole number of sources, at least 1.")
        if not is_number(swap) or not 0 <= swap <= 1:
            raise ValueError(f"`swap_probability` ({swap!r}) must lie between 0 (never) and 1 (always).")
        validate_tokens("tokens_per_rank", self.tokens_per_rank)

"""`TextsConfig`: what an embedding trainer does with texts that the model cannot read whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from .values import validate_choice


OVERLONG_POLICIES = ("warn", "error", "truncate")


@dataclass(frozen=True, kw_only=True)
class TextsConfig:
    """What an embedding trainer does with texts that the model cannot read whole.

    Args:
        overlong_texts (`str`, *optional*, defaults to `"warn"`):
            What happens when texts are longer than `model.max_seq_length`: `"warn"` reports before the first step how
            many texts and tokens would be cut off, `"error"` refuses, `"truncate"` reports nothing.

    Raises:
        ValueError: a field has a value that no run could use.
    """

    overlong_texts: str = field(
        default="warn",
        metadata={"help": "What happens to texts over `max_seq_length`: " + ", ".join(OVERLONG_POLICIES) + "."},
    )

    def __post_init__(self) -> None:
        validate_choice("overlong_texts", self.overlong_texts, OVERLONG_POLICIES)

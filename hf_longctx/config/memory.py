"""`MemoryConfig`: what a language-model trainer does so that a row fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from .values import validate_choice, validate_tokens


MEMORY_PRESETS = ("off", "loss", "mlp", "checkpoint", "max", "auto")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What a language-model trainer does so that a row fits. Results are the same with every value.

    Args:
        memory (`str`, *optional*, defaults to `"off"`):
            A preset, each on top of the one before: `"loss"` (the loss in tiles), `"mlp"` (MLPs in tiles),
            `"checkpoint"` (layers recomputed), `"max"` (checkpoints in CPU memory). `"auto"`: the first preset that
            the planner finds enough.
        loss_tile_size (`int`, *optional*):
            Tokens whose logits exist at a time. Unset: all of them, or what the preset takes.
        mlp_tile_size (`int`, *optional*):
            Tokens of a row that an MLP works on at a time. Unset: all of them, or what the preset takes.
        planned_tokens (`int`, *optional*):
            Tokens of the longest row, for `"auto"`; read from the collator or from `max_length` where they tell.

    Raises:
        ValueError: a field has a value that no run could use.
    """

    memory: str = field(
        default="off",
        metadata={"help": "What is done so that a row fits: " + ", ".join(MEMORY_PRESETS) + "."},
    )
    loss_tile_size: int | None = field(
        default=None, metadata={"help": "Tokens whose logits exist at a time; unset: all, or what `memory` takes."}
    )
    mlp_tile_size: int | None = field(
        default=None, metadata={"help": "Tokens of a row in an MLP at a time; unset: all, or what `memory` takes."}
    )
    planned_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of the longest row, where `memory` is auto and nothing else tells."}
    )

    def __post_init__(self) -> None:
        validate_choice("memory", self.memory, MEMORY_PRESETS)
        for name in ("loss_tile_size", "mlp_tile_size", "planned_tokens"):
            validate_tokens(name, getattr(self, name))

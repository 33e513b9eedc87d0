"""`MemoryConfig`: what a language-model trainer does so that a row fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from .values import validate_choice, validate_tokens


MEMORY_PRESETS = ("off", "loss", "mlp", "checkpoint", "max", "auto")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What a language-model trainer does so that a row fits. Results are the same with every value but one.

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
        reversible_layers (`bool`, *optional*, defaults to `False`):
            Run the layers in two streams, see [`make_reversible`][hf_longctx.make_reversible]: another model, to be
            trained from scratch. A model that was saved so runs so without it.

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
    reversible_layers: bool = field(
        default=False, metadata={"help": "Layers in two streams, which is another model: from scratch only."}
    )

    def __post_init__(self) -> None:
        validate_choice("memory", self.memory, MEMORY_PRESETS)
        for name in ("loss_tile_size", "mlp_tile_size", "planned_tokens"):
            validate_tokens(name, getattr(self, name))
        if not isinstance(self.reversible_layers, bool):
            raise ValueError(f"`reversible_layers` ({self.reversible_layers!r}) must be True or False.")
        if self.reversible_layers and self.memory in ("checkpoint", "max", "auto"):
            raise ValueError(
                f"`memory` ({self.memory!r}) checkpoints layers, or might, and `reversible_layers` keep nothing that "
                "it could free: set `memory` to 'mlp', 'loss' or 'off'."
            )

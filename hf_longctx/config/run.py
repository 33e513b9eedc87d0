"""What the user wants: one frozen dataclass, valid from the moment it exists.

It is an extra argument of a trainer, like `peft_config`, so it serves `TrainingArguments` and `SFTConfig` alike, and
in a recipe it is one more dataclass for `TrlParser`. Its field names never collide with the hosts'.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields


INNER_ATTENTIONS = (
    "auto",
    "sdpa",
    "eager",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)


def validate_sequence_parallel_size(size: object) -> None:
    """Raise `ValueError` unless `size` is a positive integer."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"`sequence_parallel_size` ({size!r}) must be a positive integer: it is the number of processes that "
            "share one sequence; use 1 for no sharding."
        )


NONFINITE_POLICIES = ("raise", "skip", "stop", "off")
# What decides which rows of several sources make a batch.
SOURCE_FIELDS = (
    "source_weights",
    "source_temperature",
    "source_caps",
    "sources_per_batch",
    "swap_probability",
    "deduplicate",
    "balance_by",
    "tokens_per_rank",
)
OVERLONG_POLICIES = ("warn", "error", "truncate")
MEMORY_PRESETS = ("off", "loss", "mlp", "checkpoint", "max", "auto")


def validate_tokens(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is `None` or a positive integer."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"`{name}` ({value!r}) must be a positive integer, a number of tokens, or unset.")


def validate_interval(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is 0 or a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"`{name}` ({value!r}) must be a positive integer, a number of optimizer steps, or 0 for never."
        )


def validate_inner_attention(name: object) -> None:
    """Raise `ValueError` unless `name` is a kernel name we know or a hub kernel of the form `org/name`."""
    if isinstance(name, str) and (
        name in INNER_ATTENTIONS or [bool(part) for part in name.split("/")] == [True, True]
    ):
        return
    raise ValueError(
        f"`inner_attention` ({name!r}) is not a kernel that `ulysses` can wrap: choose one of "
        f"{', '.join(INNER_ATTENTIONS)}, or a flash kernel on the Hub such as 'kernels-community/flash-attn2'."
    )


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
        if not _is_number(number) or number <= 0 or (whole and number != int(number)):
            kind = "a whole number of rows, at least 1" if whole else "a number over 0"
            raise ValueError(
                f"`{name}` gives the source `{source}` {number!r}, but it must be {kind}: leave out of the data sets "
                "what shall not be drawn."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class LongContextConfig:
    """How a run treats long sequences.

    Args:
        sequence_parallel_size (`int`, *optional*, defaults to 1):
            Number of processes that share one sequence, `P`. It must divide the number of processes and must not
            exceed the model's query heads. The remaining factor of the world is data parallel.
        inner_attention (`str`, *optional*, defaults to `"auto"`):
            The kernel that `"ulysses"` runs on its share of the heads, and `"packed"` on all of them: `"sdpa"`,
            `"eager"`, `"flex_attention"`, `"flash_attention_2"` (`_3`, `_4`) or a hub kernel `"org/name"`. `"auto"`
            takes an installed flash kernel for half precision on CUDA, otherwise `"sdpa"`, and a kernel with sinks or
            softcap where the model needs them.
        check_packing (`bool`, *optional*, defaults to `True`):
            On the first batch that packs several documents in a row, prove on a miniature of it that the model keeps
            them apart, and refuse to train if it does not.
        memory (`str`, *optional*, defaults to `"off"`):
            What is done so that a row fits, each rung on top of the one before: `"loss"` (the loss in tiles), `"mlp"`
            (MLPs in tiles), `"checkpoint"` (layers recomputed), `"max"` (checkpoints in host memory). `"auto"`: the
            first rung that the planner finds enough. Results are the same on all of them.
        loss_tile_size (`int`, *optional*):
            Tokens whose logits exist at a time. Unset: all of them, or what the rung takes.
        mlp_tile_size (`int`, *optional*):
            Tokens of a row that an MLP works on at a time. Unset: all of them, or what the rung takes.
        planned_tokens (`int`, *optional*):
            Tokens of the longest row, for `"auto"`; read from the collator or from `max_length` where they tell.
        check_replicas (`int`, *optional*, defaults to 100):
            Optimizer steps between two comparisons of what ranks must agree on, parameters and optimizer state bit for
            bit; the run stops on all ranks if they differ. 0 turns it off.
        overlong_texts (`str`, *optional*, defaults to `"warn"`):
            What happens when texts of embedding training are longer than `model.max_seq_length`: `"warn"` says before
            the first step how many texts and tokens would be cut off, `"error"` refuses, `"truncate"` says nothing.
        on_nonfinite (`str`, *optional*, defaults to `"raise"`):
            What happens to a step whose loss or gradient is not finite on any rank; the optimizer never takes it.
            `"raise"` names layer, rank and rows; `"skip"` says the same in a warning, goes on and logs
            `skipped_steps`; `"stop"` saves a checkpoint and ends training; `"off"` leaves it to the host.
        source_weights (`dict[str, float]`, *optional*):
            How often each source of embedding training is drawn, relative to the others. Unset: as often as it has
            rows.
        source_temperature (`float`, *optional*):
            Instead of weights: a source of `n` rows is drawn as often as `n ** (1 / source_temperature)`.
        source_caps (`dict[str, int]`, *optional*):
            At most so many rows of a source are ever used, always the same ones.
        sources_per_batch (`int`, *optional*, defaults to 1):
            Sources that fill equal shares of a global batch.
        swap_probability (`float`, *optional*, defaults to 0.0):
            How often the two texts of all pairs of a global batch are exchanged.
        deduplicate (`bool`, *optional*, defaults to `False`):
            No two rows of a global batch share a text; a row that would is put off to the next batch of its source.
            Every rank then reads the texts of all.
        balance_by (`str`, *optional*):
            Deal the rows of a global batch so that ranks have like work: the column with the tokens of a row, or
            `"characters"`. Every rank then reads the lengths of all.
        tokens_per_rank (`int`, *optional*):
            Fill every rank up to so many tokens instead of a number of rows.

    Raises:
        ValueError: a field has a value that no run could use.
    """

    sequence_parallel_size: int = field(
        default=1,
        metadata={"help": "Number of processes that share one sequence. Must divide the number of processes."},
    )
    inner_attention: str = field(
        default="auto",
        metadata={"help": "Kernel run by `ulysses` and `packed`: " + ", ".join(INNER_ATTENTIONS) + " or org/name."},
    )

    check_packing: bool = field(
        default=True,
        metadata={"help": "Prove on the first packed batch that its documents do not see each other."},
    )

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

    check_replicas: int = field(
        default=100,
        metadata={"help": "Optimizer steps between two checks that all ranks hold the same weights; 0: never."},
    )

    overlong_texts: str = field(
        default="warn",
        metadata={"help": "What happens to texts over `max_seq_length`: " + ", ".join(OVERLONG_POLICIES) + "."},
    )

    on_nonfinite: str = field(
        default="raise",
        metadata={"help": "What happens to a step that is not finite: " + ", ".join(NONFINITE_POLICIES) + "."},
    )

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
        default=0.0, metadata={"help": "How often the two texts of the pairs of a global batch are exchanged."}
    )
    deduplicate: bool = field(default=False, metadata={"help": "No two rows of a global batch share a text."})
    balance_by: str | None = field(
        default=None, metadata={"help": "Column with the tokens of a row, or characters: ranks get like work."}
    )
    tokens_per_rank: int | None = field(
        default=None, metadata={"help": "Tokens that fill every rank, instead of a number of rows."}
    )

    def changed(self, *names: str) -> dict[str, object]:
        """Those of the named fields that are not at their default, with their values."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    def __post_init__(self) -> None:
        validate_sequence_parallel_size(self.sequence_parallel_size)
        validate_inner_attention(self.inner_attention)
        if self.memory not in MEMORY_PRESETS:
            raise ValueError(f"`memory` ({self.memory!r}) must be one of {', '.join(MEMORY_PRESETS)}.")
        for name in ("loss_tile_size", "mlp_tile_size", "planned_tokens"):
            validate_tokens(name, getattr(self, name))
        validate_interval("check_replicas", self.check_replicas)
        if self.overlong_texts not in OVERLONG_POLICIES:
            raise ValueError(
                f"`overlong_texts` ({self.overlong_texts!r}) must be one of {', '.join(OVERLONG_POLICIES)}."
            )
        if self.on_nonfinite not in NONFINITE_POLICIES:
            raise ValueError(f"`on_nonfinite` ({self.on_nonfinite!r}) must be one of {', '.join(NONFINITE_POLICIES)}.")
        self._validate_sources()

    def _validate_sources(self) -> None:
        for name in ("source_weights", "source_caps"):
            object.__setattr__(self, name, read_mapping(name, getattr(self, name)))  # frozen, and from a command line
            validate_sources_by_name(name, getattr(self, name), whole=name == "source_caps")
        temperature, swap, shares = self.source_temperature, self.swap_probability, self.sources_per_batch
        if temperature is not None and (not _is_number(temperature) or temperature <= 0):
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
        if not _is_number(swap) or not 0 <= swap <= 1:
            raise ValueError(f"`swap_probability` ({swap!r}) must lie between 0 (never) and 1 (always).")
        validate_tokens("tokens_per_rank", self.tokens_per_rank)

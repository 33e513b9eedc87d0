"""`LongContextConfig`: what every trainer understands.

It is an extra argument of a trainer, like `peft_config`, so it serves `TrainingArguments` and `SFTConfig` alike, and
in a recipe it is one more dataclass for `TrlParser`. Its field names never collide with the libraries'. What only some
trainers understand has a separate config; `audiences.py` lists which trainer takes which.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .values import validate_choice


INNER_ATTENTIONS = (
    "auto",
    "sdpa",
    "eager",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "lsh",
)
NONFINITE_POLICIES = ("raise", "skip", "stop", "off")


def validate_sequence_parallel_size(size: object) -> None:
    """Raise `ValueError` unless `size` is a positive integer."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"`sequence_parallel_size` ({size!r}) must be a positive integer: it is the number of processes that "
            "share one sequence; use 1 for no sharding."
        )


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


@dataclass(frozen=True, kw_only=True)
class LongContextConfig:
    """How a run treats long sequences: what every trainer understands.

    Args:
        sequence_parallel_size (`int`, *optional*, defaults to 1):
            Number of processes that share one sequence, `P`. It must divide the number of processes and must not
            exceed the model's query heads. The remaining factor of the world is data parallel.
        inner_attention (`str`, *optional*, defaults to `"auto"`):
            The kernel that `"ulysses"` runs on its share of the heads, and `"packed"` on all of them: `"sdpa"`,
            `"eager"`, `"flex_attention"`, `"flash_attention_2"` (`_3`, `_4`), `"lsh"` or a hub kernel `"org/name"`.
            `"auto"` takes what the model's configuration names (`"lsh"`), an installed flash kernel for half precision
            on CUDA, otherwise `"sdpa"`, and a kernel with sinks or softcap where the model needs them.
        check_packing (`bool`, *optional*, defaults to `True`):
            Prove that the model keeps packed documents apart, and refuse to train if it does not: on a miniature of
            the first batch that packs several documents in a row, or for embeddings on three short texts.
        check_replicas (`int`, *optional*, defaults to 100):
            Optimizer steps between two comparisons of what ranks must agree on, parameters and optimizer state bit for
            bit; the run stops on all ranks if they differ. 0 turns it off.
        on_nonfinite (`str`, *optional*, defaults to `"raise"`):
            What happens to a step whose loss or gradient is not finite on any rank; the optimizer never takes it.
            `"raise"` names layer, rank and rows; `"skip"` says the same in a warning, goes on and logs
            `skipped_steps`; `"stop"` saves a checkpoint and ends training; `"off"` leaves it to the base trainer.

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
        metadata={"help": "Prove that packed documents do not see each other."},
    )

    check_replicas: int = field(
        default=100,
        metadata={"help": "Optimizer steps between two checks that all ranks hold the same weights; 0: never."},
    )

    on_nonfinite: str = field(
        default="raise",
        metadata={"help": "What happens to a step that is not finite: " + ", ".join(NONFINITE_POLICIES) + "."},
    )

    def __post_init__(self) -> None:
        validate_sequence_parallel_size(self.sequence_parallel_size)
        validate_inner_attention(self.inner_attention)
        validate_interval("check_replicas", self.check_replicas)
        validate_choice("on_nonfinite", self.on_nonfinite, NONFINITE_POLICIES)

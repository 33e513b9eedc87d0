"""`SleepConfig`: how a hybrid thinks over the tokens that it is about to forget."""

from __future__ import annotations

from dataclasses import dataclass, field

from .values import validate_choice


EVICTIONS = ("hard", "sliding")


@dataclass(frozen=True, kw_only=True)
class SleepWarmup:
    """How a run comes to sleep: fewer passes at first, and recurrent layers before the others.

    Args:
        pass_steps (`tuple[int, ...]`, *optional*, defaults to `()`):
            Finished optimizer steps after each of which a window sleeps one pass more, from one pass up. `(100, 300)`
            with `passes=3`: one pass, two from step 100, three from step 300. Empty: all passes from the start.
        recurrent_steps (`int`, *optional*, defaults to 0):
            First optimizer steps, in which only the recurrent layers are trained, under hard eviction. With
            `eviction="sliding"` attention would otherwise answer from what it still holds, and the state is ignored.

    Raises:
        ValueError: a field has a value that no run could use.
    """

    pass_steps: tuple[int, ...] = field(
        default=(), metadata={"help": "Finished steps after each of which a window sleeps one pass more."}
    )
    recurrent_steps: int = field(
        default=0, metadata={"help": "First steps, in which only recurrent layers are trained, under hard eviction."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.pass_steps, list):  # as a YAML file gives it
            object.__setattr__(self, "pass_steps", tuple(self.pass_steps))
        steps = self.pass_steps
        valid = isinstance(steps, tuple) and all(_is_count(step, 1) for step in steps)
        if not valid or list(steps) != sorted(set(steps)):
            raise ValueError(
                f"`pass_steps` ({steps!r}) must be rising numbers of optimizer steps, such as (100, 300)."
            )
        if not _is_count(self.recurrent_steps, 0):
            raise ValueError(
                f"`recurrent_steps` ({self.recurrent_steps!r}) must be a number of optimizer steps, or 0."
            )


@dataclass(frozen=True, kw_only=True)
class SleepConfig:
    """How a hybrid sleeps: which tokens it forgets at a time, and how often it thinks them over before.

    Args:
        window (`int`, *optional*):
            Tokens that attention holds. Whenever they are full, they are thought over, and their keys and values are
            dropped; recurrent states stay. Unset: the model does not sleep.
        passes (`int`, *optional*, defaults to 1):
            How often the stack of layers runs over a window that sleeps. 1 is the model as it is.
        eviction (`str`, *optional*, defaults to `"hard"`):
            `"hard"`: all keys and values are dropped. `"sliding"`: each token attends to the `window - 1` before it,
            over the border of windows; those keys are kept.
        loop_layers (`tuple[int, int]`, *optional*):
            First layer of the loop, and the one behind its last. The layers before run in the first pass only, those
            behind in the last. Unset: all layers are looped.
        answers_sleep (`bool`, *optional*, defaults to `False`):
            Whether a full window with labels, or one that was generated, sleeps too, once it was read in a single
            pass. The paper's does not: its state is that of the single pass.
        warmup ([`SleepWarmup`], *optional*):
            How a run comes to all of this.

    Raises:
        ValueError: a field has a value that no run could use.
    """

    window: int | None = field(default=None, metadata={"help": "Tokens that attention holds; unset: no sleep."})
    passes: int = field(default=1, metadata={"help": "How often the layers run over a window that sleeps."})
    eviction: str = field(
        default="hard", metadata={"help": "Which keys and values are dropped: " + ", ".join(EVICTIONS) + "."}
    )
    loop_layers: tuple[int, int] | None = field(
        default=None, metadata={"help": "First looped layer, and the one behind the last; unset: all."}
    )
    answers_sleep: bool = field(
        default=False, metadata={"help": "Whether full windows with labels, or generated ones, sleep too."}
    )
    warmup: SleepWarmup | None = field(default=None, metadata={"help": "How a run comes to sleep."})

    def __post_init__(self) -> None:
        if self.window is not None and not _is_count(self.window, 2):
            raise ValueError(f"`window` ({self.window!r}) must be a number of tokens, 2 or more.")
        if not _is_count(self.passes, 1):
            raise ValueError(f"`passes` ({self.passes!r}) must be a whole number, 1 or more.")
        validate_choice("eviction", self.eviction, EVICTIONS)
        self._check_loop()
        if not isinstance(self.answers_sleep, bool):
            raise ValueError(f"`answers_sleep` ({self.answers_sleep!r}) must be True or False.")
        if self.warmup is not None:
            self._check_warmup(self.warmup)
        if self.window is None and (self.passes, self.eviction, self.loop_layers) != (1, "hard", None):
            raise ValueError("`passes`, `eviction` and `loop_layers` say how a window sleeps: set `window`, too.")

    def _check_loop(self) -> None:
        loop = self.loop_layers
        if isinstance(loop, list):
            loop = tuple(loop)
            object.__setattr__(self, "loop_layers", loop)
        if loop is None:
            return
        if not (isinstance(loop, tuple) and len(loop) == 2 and all(_is_count(layer, 0) for layer in loop)):
            raise ValueError(f"`loop_layers` ({loop!r}) must be two numbers of layers, such as (7, 21), or unset.")
        if loop[0] >= loop[1]:
            raise ValueError(f"`loop_layers` ({loop!r}) holds no layer: its first number must be below its second.")

    def _check_warmup(self, warmup: object) -> None:
        if not isinstance(warmup, SleepWarmup):
            raise ValueError(f"`warmup` ({warmup!r}) must be given as a `SleepWarmup`.")
        if warmup.pass_steps and len(warmup.pass_steps) != self.passes - 1:
            raise ValueError(
                f"`pass_steps` ({warmup.pass_steps!r}) adds {len(warmup.pass_steps)} passes to the first, but "
                f"`passes` is {self.passes}: name {self.passes - 1} steps."
            )

    def at(self, step: int) -> SleepConfig:
        """The settings of the optimizer step after `step` finished ones, without a warm-up."""
        warmup = self.warmup
        if warmup is None:
            return self
        passes = self.passes
        if warmup.pass_steps:
            passes = 1 + sum(step >= after for after in warmup.pass_steps)
        eviction = "hard" if self.trains_recurrent_only(step) else self.eviction
        return SleepConfig(
            window=self.window,
            passes=passes,
            eviction=eviction,
            loop_layers=self.loop_layers,
            answers_sleep=self.answers_sleep,
        )

    def trains_recurrent_only(self, step: int) -> bool:
        """Whether the optimizer step after `step` finished ones trains the recurrent layers alone."""
        return self.warmup is not None and step < self.warmup.recurrent_steps


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

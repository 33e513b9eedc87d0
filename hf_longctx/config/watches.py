"""`WatchConfig`: what looks after a long run, for recipes; a script passes the callbacks themselves."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from .values import validate_choice, validate_count, validate_positive


SPIKE_ACTIONS = ("warn", "skip", "rollback", "stop")
_OF_SPIKES = ("spike_window", "spike_deviations", "spike_limit")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What looks after a long run, as names of a recipe. Unset: that watch is off.

    Args:
        kill_switch (`str`, *optional*):
            A file; once it exists, the run saves and ends. See [`KillSwitch`].
        spike_action (`str`, *optional*):
            What happens to a step whose loss or gradient norm spikes: `"warn"`, `"skip"`, `"rollback"` or `"stop"`.
            See [`LossSpikeGuard`] for this and the next three.
        spike_window (`int`, *optional*, defaults to 100): steps that a step is compared with.
        spike_deviations (`float`, *optional*, defaults to 10.0): how many median deviations make a spike.
        spike_limit (`int`, *optional*, defaults to 3): how many spikes are acted on.
        slow_rank_every (`int`, *optional*):
            Steps of a window in which ranks are compared. See [`SlowRankWatch`].
        advise_checkpoints (`bool`, *optional*, defaults to `False`):
            Log how often to save. See [`CheckpointAdvisor`].
        hours_between_failures (`float`, *optional*):
            Hours from one failure of the run to the next, on average, for that.

    Raises:
        ValueError: a field has a value that no run could use.
    """

    kill_switch: str | None = field(
        default=None, metadata={"help": "A file; once it exists, the run saves and ends; unset: none."}
    )
    spike_action: str | None = field(
        default=None, metadata={"help": "What happens to a step that spikes: " + ", ".join(SPIKE_ACTIONS) + "."}
    )
    spike_window: int = field(default=100, metadata={"help": "Steps that a step is compared with."})
    spike_deviations: float = field(default=10.0, metadata={"help": "How many median deviations make a spike."})
    spike_limit: int = field(default=3, metadata={"help": "How many spikes are acted on."})
    slow_rank_every: int | None = field(
        default=None, metadata={"help": "Steps of a window in which ranks are compared; unset: they are not."}
    )
    advise_checkpoints: bool = field(default=False, metadata={"help": "Log how often to save."})
    hours_between_failures: float | None = field(
        default=None, metadata={"help": "Hours from one failure of the run to the next; unset: by its processes."}
    )

    def __post_init__(self) -> None:
        name = self.kill_switch
        if name is not None and (not isinstance(name, str) or not name.strip() or "\0" in name):
            raise ValueError(f"`kill_switch` ({self.kill_switch!r}) must name a file, or be left out.")
        if not isinstance(self.advise_checkpoints, bool):
            raise ValueError(f"`advise_checkpoints` ({self.advise_checkpoints!r}) must be true or false.")
        if self.spike_action is not None:
            validate_choice("spike_action", self.spike_action, SPIKE_ACTIONS)
        validate_count("spike_window", self.spike_window, "steps", least=2)
        validate_positive("spike_deviations", self.spike_deviations, "median deviations over the median")
        validate_count("spike_limit", self.spike_limit, "spikes")
        for each in fields(self) if self.spike_action is None else ():
            value = getattr(self, each.name)
            if each.name in _OF_SPIKES and value != each.default:
                raise ValueError(
                    f"`{each.name}` ({value!r}) is of the guard of spikes, which is off: set `spike_action`, or leave "
                    "it out."
                )
        if self.slow_rank_every is not None:
            validate_count("slow_rank_every", self.slow_rank_every, "steps")
        if self.hours_between_failures is not None:
            validate_positive("hours_between_failures", self.hours_between_failures, "hours of the whole run")
            if not self.advise_checkpoints:
                raise ValueError(
                    f"`hours_between_failures` ({self.hours_between_failures}) is for the advice on checkpoints: set "
                    "`advise_checkpoints`, or leave it out."
                )

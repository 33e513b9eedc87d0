"""Which trainer takes which configs, by keyword: the one table, and the errors for everything else.

A new config is one dataclass in this room and one entry a trainer that understands it. A new trainer is one row.
"""

from __future__ import annotations

from collections.abc import Mapping

from .indexer import IndexerConfig
from .memory import MemoryConfig
from .pair_rows import PreferenceConfig
from .ramp import RampConfig
from .run import LongContextConfig
from .sleep import SleepConfig
from .sources import SourcesConfig
from .texts import TextsConfig


_LANGUAGE_MODELS = {
    "long_context": LongContextConfig,
    "memory": MemoryConfig,
    "indexer": IndexerConfig,
    "ramp": RampConfig,
    "sleep": SleepConfig,
}
_PREFERENCES = {"long_context": LongContextConfig, "memory": MemoryConfig, "preference": PreferenceConfig}
TRAINERS: dict[str, dict[str, type]] = {
    "LongContextTrainer": _LANGUAGE_MODELS,
    "LongContextSFTTrainer": _LANGUAGE_MODELS,
    "LongContextDPOTrainer": _PREFERENCES,
    "LongContextKTOTrainer": _PREFERENCES,
    "LongContextRewardTrainer": {"long_context": LongContextConfig, "memory": MemoryConfig},
    "LongContextSentenceTransformerTrainer": {
        "long_context": LongContextConfig,
        "sources": SourcesConfig,
        "texts": TextsConfig,
    },
}

# Trainers that take a keyword only to say why they refuse it, and what to use.
_ONLY_REFUSED = {("LongContextSFTTrainer", "sleep")}


def take_configs(trainer: str, configs: Mapping[str, type], arguments: dict[str, object]) -> dict[str, object]:
    """Take a trainer's configs out of its keyword arguments; one that is not given has its defaults.

    Args:
        trainer (`str`): name of the class, for messages.
        configs (`Mapping[str, type]`): what it understands: keyword to class.
        arguments (`dict`): of the trainer's constructor; changed in place.

    Returns:
        `dict[str, object]`: keyword to config, for every keyword of `configs`.

    Raises:
        ValueError: a config that only other trainers understand, or one under another's keyword.
    """
    for name in arguments:
        if name not in configs and any(name in row for row in TRAINERS.values()):
            raise ValueError(
                f"`{name}` ({arguments[name]!r}) is for {_trainers_with(name)}, and `{trainer}` takes "
                f"{_quoted(configs)}: leave it out."
            )
    given = {name: arguments.pop(name, None) for name in configs}
    for name, value in given.items():
        if value is not None and not isinstance(value, configs[name]):
            raise ValueError(
                f"`{name}` ({value!r}) must be given as a `{configs[name].__name__}`: "
                f"{_right_place(type(value), configs) or f'write `{name}={configs[name].__name__}(...)`'}."
            )
    return {name: kind() if given[name] is None else given[name] for name, kind in configs.items()}


def _right_place(kind: type, configs: Mapping[str, type]) -> str:
    """The end of a message: where a config of another class belongs."""
    for name, known in configs.items():
        if issubclass(kind, known):
            return f"pass the `{kind.__name__}` as `{name}`"
    for name in dict.fromkeys(name for row in TRAINERS.values() for name in row):
        if any(issubclass(kind, row[name]) for row in TRAINERS.values() if name in row):
            return f"a `{kind.__name__}` is for {_trainers_with(name)}, as `{name}`"
    return ""


def _trainers_with(name: str) -> str:
    takes = (trainer for trainer, row in TRAINERS.items() if name in row)
    return _quoted(trainer for trainer in takes if (trainer, name) not in _ONLY_REFUSED)


def _quoted(names) -> str:
    *first, last = [f"`{name}`" for name in names]
    return f"{', '.join(first)} and {last}" if first else last

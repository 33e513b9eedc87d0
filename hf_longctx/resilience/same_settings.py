"""All ranks run with the same settings, or none does: compared once, before anything else is.

Some settings decide which collectives run (`on_nonfinite`, `check_replicas`, `logging_steps`), so ranks that disagree
wait for each other; others (`loss_tile_size`, `learning_rate`) let replicas drift. A checksum of all of them is
gathered over the world; only if it differs are the settings themselves, as text, to name the field and the values.
Price: one all-gather of 8 bytes a trainer.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..parallel.collectives import gather_integer_rows, gather_integers


# What may differ: places on a node, secrets, who logs and pushes, how many workers read.
_LOCAL = re.compile(
    r"local_rank|_n_gpu|ddp_timeout|(resume_from_checkpoint|run_name|report_to|disable_tqdm|project)|"
    r"(log_level|log_on_each|hub_|push_to_hub|trackio|dataloader_(num_workers|multiprocessing|prefetch|persistent|pin))\w*|"
    r"(__)?(cached_setup_devices|distributed_state|deepspeed_plugin|_mixed_precision)\w*|dataset_num_proc|"
    r"\w*(_dir|_folder|_path|_file|password|secret|api_key)"
)


def validate_same_settings(configs: Mapping[str, object], args: Any, shares_rows: bool) -> bool:
    """Refuse ranks that were started with different settings. Every process calls it, as its first collective.

    Args:
        configs (`Mapping[str, object]`): the configs of the run by keyword, dataclasses or mappings.
        args: `TrainingArguments`, of which what differs by right is left out: folders, hub and tracker settings, data
            workers.
        shares_rows (`bool`): ranks share rows here; otherwise seeds may differ if `data_seed` sets the order of rows.

    Returns:
        `bool`: whether they were compared; `False` before the processes have met.

    Raises:
        ValueError: on every rank, with the field and the values of the ranks.

    Communication: one all-gather of 8 bytes a rank, over the world; two more if settings differ.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    if dist.get_world_size() == 1:
        return True
    mine = settings_of(configs, args, shares_rows)
    text = json.dumps(mine, sort_keys=True).encode()
    checksum = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    if len(set(gather_integers(checksum, dist.group.WORLD))) == 1:
        return True
    ranks = _gather_settings(text)
    names = sorted({name for settings in ranks for name in settings})
    differing = [name for name in names if len({settings.get(name, "unset") for settings in ranks}) > 1]
    more = f", and so do {len(differing) - 1} more settings" if len(differing) > 1 else ""
    raise ValueError(
        f"`{differing[0]}` differs between ranks ({_by_rank(differing[0], ranks)}){more}: all processes of a run need "
        "the same settings; start them from one configuration."
    )


def settings_of(configs: Mapping[str, object], args: Any, shares_rows: bool) -> dict[str, str]:
    """Every setting that ranks must agree on, by name, as text."""
    settings = {f"{name}.{key}": value for name, config in configs.items() for key, value in _fields(config).items()}
    given = {} if args is None else {key: value for key, value in _fields(args).items() if not _LOCAL.fullmatch(key)}
    if not shares_rows and given.get("data_seed") is not None:
        given.pop("seed", None)
    settings |= {f"args.{name}": value for name, value in given.items()}
    return {name: _as_text(value) for name, value in settings.items()}


def _fields(config: object) -> dict[str, object]:
    if dataclasses.is_dataclass(config):
        return {field.name: getattr(config, field.name, None) for field in dataclasses.fields(config)}
    return dict(config) if isinstance(config, Mapping) else {}


def _as_text(value: object) -> str:
    """A value as text that is equal on all processes: no addresses of objects, no order of sets."""
    if isinstance(value, enum.Enum):
        return _as_text(value.value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, Mapping):
        items = sorted((_as_text(key), _as_text(item)) for key, item in value.items())
        return "{" + ", ".join(f"{key}: {item}" for key, item in items) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_as_text(item) for item in value) + "]"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(_as_text(item) for item in value)) + "}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _as_text(_fields(value))
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _gather_settings(text: bytes) -> list[dict[str, str]]:
    world = dist.group.WORLD
    lengths = gather_integers(len(text), world)
    device = "cuda" if "nccl" in dist.get_backend(world) else "cpu"
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    rows = gather_integer_rows(padded.to(device), world).cpu()
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths)]


def _by_rank(name: str, ranks: list[dict[str, str]]) -> str:
    """`'raise' on rank 0, 'skip' on ranks 1, 2 and 5 more`."""
    holders: dict[str, list[int]] = {}
    for rank, settings in enumerate(ranks):
        holders.setdefault(settings.get(name, "unset"), []).append(rank)
    parts = []
    for value, where in holders.items():
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        places = ", ".join(map(str, where[:3]))
        parts.append(f"{value[:80]} on rank{'s' if len(where) > 1 else ''} {places}{more}")
    return ", ".join(parts)

"""Where torch's flight recorder leaves its dump when NCCL's timeout ends a run.

What: torch keeps the last collectives of every rank and writes them to one file a rank. Which file, and whether at
all, is set by environment variables that torch reads; they are read here as torch 2.11 to 2.13 read them, and none is
set. Price: nothing until a hang is reported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist


_DEFAULT_SIZE = "2000"
_TRUE = ("y", "yes", "1", "t", "true")
_REMEDY = "start the next run with {} to get the last collectives of every rank"


def uses_nccl() -> bool:
    """Whether the default process group has NCCL among its backends."""
    return "nccl" in dist.get_backend_config()


def describe_dump(rank: int, environment: Mapping[str, str] = os.environ, since: float = float("inf")) -> str:
    """One sentence: the file of this rank's dump, or which variables to set.

    Args:
        rank (`int`): of this process among all.
        environment (`Mapping`): the variables that torch reads.
        since (`float`): seconds since the epoch; a file that is newer has been written by this hang.
    """
    missing = _variables_to_set(environment)
    if missing:
        return f"torch's flight recorder writes no dump: {_REMEDY.format(' '.join(missing))}"
    file = dump_file(rank, environment)
    try:
        is_written = file.stat().st_mtime >= since
    except OSError:
        is_written = False
    when = "has written" if is_written else "will write, when NCCL's timeout ends the run,"
    return (
        f"torch's flight recorder {when} this rank's last collectives to `{file}`: `torchfrtrace {file.parent}` "
        "compares the files of all ranks"
    )


def dump_file(rank: int, environment: Mapping[str, str]) -> Path:
    """The file that torch's default writer opens."""
    if environment.get("TORCH_FR_DUMP_DYNAMIC_FILE_NAME", "").lower() in _TRUE:
        return Path(environment.get("TORCH_FR_DUMP_TEMP_FILE", ""))
    cache = environment.get("XDG_CACHE_HOME", environment.get("HOME", "/tmp") + "/.cache")
    prefix = environment.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{cache}/torch/comm_lib_trace_rank_")
    return Path(environment.get("TORCH_FR_DUMP_TEMP_FILE", prefix) + str(rank))


def _variables_to_set(environment: Mapping[str, str]) -> list[str]:
    """What keeps torch from recording or writing, with the value that lets it."""
    # The recorder reads the first, and the second where the first is unset; NCCL's timeout reads the second only.
    sizes = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
    missing = [f"{name}={_DEFAULT_SIZE}" for name in sizes if not _is_positive(environment.get(name, _DEFAULT_SIZE))]
    if environment.get("TORCH_NCCL_DUMP_ON_TIMEOUT", "1").lower() not in _TRUE:
        missing.append("TORCH_NCCL_DUMP_ON_TIMEOUT=1")
    return missing


def _is_positive(text: str) -> bool:
    try:
        return int(text) > 0
    except ValueError:
        return False

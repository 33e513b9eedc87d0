"""The command that started this run, as a reader would type it again, without secrets.

A model card shows it, and a model card is public: what looks like a token, key or password becomes `<redacted>`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence


REDACTED = "<redacted>"
_SECRET_FLAG = re.compile(r"password|passwd|secret|credential|(api|access|private)_?key|(^|_)(token|key|auth|pat)$")
_WORD_FLAG = re.compile(r"^(eos|bos|pad|unk|sep|cls|mask|image|video|audio)_token$")  # words of a vocabulary
_SECRET_VALUE = re.compile(
    r"\bhf_(?=\w*[A-Z0-9])[A-Za-z0-9]{8,}|\bsk-[\w-]{16,}|\bgh[pousr]_\w{16,}|\bgithub_pat_\w{16,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_SECRET_PAIR = re.compile(r"(\w*(?:token|password|secret|api_key)[\"']?\s*[:=]\s*)([\"']?)[^\"',}\s]+", re.IGNORECASE)


def launch_command(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> str:
    """The shell line that starts this run again.

    Args:
        arguments (`Sequence[str]`, *optional*, defaults to `sys.argv`): script and its arguments.
        environment (`Mapping[str, str]`, *optional*, defaults to `os.environ`): where a launcher says what it started.

    Returns:
        `str`: quoted for a shell, secrets replaced.
    """
    arguments = list(sys.argv if arguments is None else arguments)
    environment = os.environ if environment is None else environment
    if arguments and os.path.isabs(arguments[0]):
        near = os.path.relpath(arguments[0])
        arguments[0] = os.path.basename(arguments[0]) if near.startswith("..") else near
    # The placeholder is no shell word; quoted it would read as a real value, which is what we want it not to be.
    return shlex.join([*_launcher(environment), *redact(arguments)]).replace(f"'{REDACTED}'", REDACTED)


def _launcher(environment: Mapping[str, str]) -> list[str]:
    num_nodes = environment.get("GROUP_WORLD_SIZE", "1")
    if "ACCELERATE_DYNAMO_USE_FULLGRAPH" in environment:  # set by `accelerate launch` only
        launcher = ["accelerate", "launch", "--num_processes", environment.get("WORLD_SIZE", "1")]
        if num_nodes != "1":
            launcher += ["--num_machines", num_nodes]
        if environment.get("ACCELERATE_USE_FSDP") == "true":
            launcher += ["--use_fsdp", "--fsdp_version", environment.get("FSDP_VERSION", "1")]
        return launcher
    if "TORCHELASTIC_RUN_ID" in environment:
        nodes = ["--standalone"] if num_nodes == "1" else ["--nnodes", num_nodes]
        return ["torchrun", *nodes, "--nproc_per_node", environment.get("LOCAL_WORLD_SIZE", "1")]
    return ["python"]


def redact(arguments: Sequence[str]) -> list[str]:
    """Replace the values of secret-looking options, and secret-looking values wherever they stand."""
    cleaned, hide_next = [], False
    for argument in arguments:
        if hide_next and not argument.startswith("--"):
            cleaned.append(REDACTED)
            hide_next = False
            continue
        flag, equals, _ = argument.partition("=")
        hide_next = False
        if flag.startswith("--") and _is_secret(flag):
            hide_next = not equals
            cleaned.append(f"{flag}={REDACTED}" if equals else argument)
        else:
            cleaned.append(_SECRET_PAIR.sub(rf"\1\2{REDACTED}", _SECRET_VALUE.sub(REDACTED, argument)))
    return cleaned


def _is_secret(flag: str) -> bool:
    name = flag.lstrip("-").replace("-", "_").lower()
    return bool(_SECRET_FLAG.search(name)) and not _WORD_FLAG.match(name)

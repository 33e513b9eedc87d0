"""The command that started this run, as a reader would type it again, without secrets.

A model card shows it, and a model card is public: what looks like a token, key or password becomes `<redacted>`, see
`redaction.py`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from .redaction import REDACTED, redact


# How `sys.argv` begins under our own command, with the name of the task behind it.
_COMMAND = "hf-longctx"


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
    launcher = _launcher(environment)
    if arguments and arguments[0].startswith(f"{_COMMAND} "):  # a launcher starts it as a module
        words = arguments.pop(0).split()
        arguments[:0] = words if launcher == ["python"] else ["-m", "hf_longctx", *words[1:]]
        launcher = [] if launcher == ["python"] else launcher
    elif arguments and os.path.isabs(arguments[0]):
        near = os.path.relpath(arguments[0])
        arguments[0] = os.path.basename(arguments[0]) if near.startswith("..") else near
    # The placeholder is no shell word; quoted it would read as a real value, which is what we want it not to be.
    return shlex.join([*launcher, *redact(arguments)]).replace(f"'{REDACTED}'", REDACTED)


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

"""Launch settings of accelerate that come with the package: DDP and FSDP2 on one node, FSDP2 on two."""

from __future__ import annotations

from pathlib import Path


def named_settings() -> dict[str, Path]:
    """The YAML files by name, such as `fsdp2_8gpu`."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def find_settings(name: str) -> Path:
    """The file of a name, or a file of the user's own.

    Raises:
        ValueError: there is neither.
    """
    known = named_settings()
    path = known.get(name, Path(name))
    if not path.is_file():
        raise ValueError(
            f"`--accelerate_config` ({name}) is neither a file nor one of {', '.join(known)}: give one of them."
        )
    return path

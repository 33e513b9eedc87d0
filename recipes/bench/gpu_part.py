"""One row of `gpu_parts.py`: which script, with which arguments, and what of its result is a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpu_figures import Figure


@dataclass(frozen=True)
class Part:
    """One row of the run.

    Args:
        name (`str`): of the part.
        what (`str`): in words.
        script (`str`): of this folder.
        page (`str`, *optional*): how its page is called, before `_cuda.md`; as the script unless given.
        seconds (`float`): its share of the time; what earlier parts leave is shared out again.
        arguments, tiny (`str`): of the script, without `--device` and `--output`; `{minutes}` is the time it has.
        figures (`Sequence[Figure]`): what of its result is shown.
        needs (`Mapping[str, str]`): packages beyond torch, transformers and accelerate, each with its least version.
    """

    name: str
    what: str
    script: str
    seconds: float
    arguments: str
    tiny: str
    figures: Sequence[Figure] = ()
    needs: Mapping[str, str] = field(default_factory=dict)
    page: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "page", self.page or self.script)

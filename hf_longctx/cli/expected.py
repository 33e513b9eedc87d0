"""Which errors end a command with their sentence and exit code 2, and which are faults that keep their traceback."""

from __future__ import annotations

import traceback
from pathlib import Path


# What a wrong file, setting, model or machine raises.
_EXPECTED = (ValueError, NotImplementedError, ImportError, OSError)
_PACKAGE = Path(__file__).parents[1]
# These check arguments, models and data as we do; what they raise inside a step is a fault.
_LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets", "sentence_transformers", "huggingface_hub")
_PLAIN = (ValueError, NotImplementedError, ImportError, ModuleNotFoundError, OSError, FileNotFoundError)
_STEPS = {"training_step", "compute_loss", "backward", "_inner_training_loop"}


def sentence_of(error: BaseException) -> str | None:
    """What a command says instead of a traceback; `None` for a fault.

    Ours are errors that this package raised. A library's is one that it raised about arguments, a model or data before
    the first step; the library is named, so that nobody looks for the rule here.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not isinstance(error, _EXPECTED):
        return None
    last = Path(frames[-1].filename)
    if _PACKAGE in last.parents:
        return str(error)
    library = next((part for part in reversed(last.parts) if part in _LIBRARIES), None)
    is_plain = type(error) in _PLAIN or isinstance(error, OSError)
    if library is None or not is_plain or _STEPS & {frame.name for frame in frames}:
        return None
    return f"{str(error).strip()} (said by {library})"

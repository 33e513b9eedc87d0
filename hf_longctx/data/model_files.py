"""Files of a model that a user names, looked at before transformers opens them.

A pipe is not waited for, and a damaged file is named.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..config.test_time import FAST_WEIGHTS
from .files import irregular, read_json, shown


_ENDINGS = (".json", ".safetensors", ".bin", ".gguf", ".model", ".pt", ".pth")


def check_model_files(name: str | os.PathLike, *, weights: bool = False, fast_weights: bool = False) -> None:
    """Raise `ValueError` for a folder that `AutoModel` cannot load, by its files; a name that is not here passes.

    Args:
        name (`str`): a folder, the path of a `config.json`, or a name on the Hub.
        weights (`bool`, *optional*, defaults to `False`): also read the header of every file of `safetensors`.
        fast_weights (`bool`, *optional*, defaults to `False`): whether a model with fast weights may lie there, which
            `AutoModel` does not know.
    """
    path = Path(name).expanduser()
    if not os.path.lexists(path):
        return
    files = [file for file in sorted(path.iterdir()) if file.suffix in _ENDINGS] if path.is_dir() else [path]
    for file in files:
        reason = irregular(file)
        if reason is not None and reason != "a folder":
            raise ValueError(f"`{shown(file)}` is {reason} and no regular file: put the file itself there.")
    config = path / "config.json" if path.is_dir() else path
    if config.suffix == ".json" and config.is_file():
        kind = read_json(config).get("model_type")
        if kind == FAST_WEIGHTS and not fast_weights:
            raise ValueError(
                f"`{shown(path)}` already has fast weights (`model_type` {kind!r}), and `AutoModel` does not know "
                "these: use `hf-longctx ttt train` or `eval`, or load it with `TTTForCausalLM.from_pretrained`."
            )
    if weights:
        for file in files:
            if file.suffix == ".safetensors":
                read_header(file)


def read_header(file: Path) -> None:
    """Raise `ValueError` unless a file of `safetensors` is whole; its tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{shown(file)}` is cut off or damaged ({error}): load it again.") from error

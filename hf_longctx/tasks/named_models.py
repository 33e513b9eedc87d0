"""Models that a command names: looked up before anything is loaded, so that a message has the true cause.

transformers takes a folder that is not there for a name on the Hub, and one without a configuration for a model of an
unknown type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.files import read_json
from .document_places import model_folder


_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def find_model(name: str | None, argument: str, gguf_file: str | None = None) -> str:
    """The folder or name on the Hub that transformers gets.

    Args:
        name (`str`): a folder, `package:NAME` or a name on the Hub.
        argument (`str`): where the user gave it, for messages.
        gguf_file (`str`, *optional*): a file in the folder that stands for its configuration and weights.

    Raises:
        ValueError: a folder that is not there, or holds no model.
    """
    if not name or not name.strip():
        raise ValueError(f"{argument} is missing: give a folder, a name on the Hub, or `package:NAME`.")
    source = model_folder(name)
    path = Path(source).expanduser()
    if path.is_dir():
        _validate_folder(path, name, argument, gguf_file)
        return str(path)
    if path.exists():
        raise ValueError(f"{argument} ({name}) is a file: name the folder that holds it, `{path.parent}`.")
    if _is_path(name):
        raise ValueError(f"{argument} ({name}) is not there: give a folder that exists, or a name on the Hub.")
    return source


def _is_path(name: str) -> bool:
    """Whether a name can be no model on the Hub, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def _validate_folder(path: Path, name: str, argument: str, gguf_file: str | None) -> None:
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise ValueError(f"`gguf_file` (`{gguf_file}`) is not in `{name}`, which holds {_contents(path)}.")
        return
    if (path / _CONFIG).exists():
        return
    if (path / _ADAPTER).is_file():
        raise ValueError(
            f"{argument} ({name}) holds an adapter without its model: name the whole model, such as the folder "
            "`merged` that `hf-longctx ttt train` writes into its `output_dir`."
        )
    packed = [file.name for file in sorted(path.glob("*.gguf"))]
    remedy = f"name its file, `--gguf_file {packed[0]}`." if packed else "give a folder that `save_pretrained` wrote."
    raise ValueError(f"{argument} ({name}) has no `{_CONFIG}`, it holds {_contents(path)}: {remedy}")


def _contents(path: Path) -> str:
    names = sorted(file.name for file in path.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(f"`{name}`" for name in names[:5]) or "nothing") + more


def read_model_config(source: str, argument: str) -> dict[str, Any]:
    """What stands in the configuration of a model that [`find_model`] found.

    Raises:
        ValueError: it cannot be read, or the Hub has none.
    """
    from transformers import PreTrainedConfig

    if Path(source).is_dir():
        return read_json(Path(source) / _CONFIG)
    try:
        found, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the configuration of {argument} ({source}) is not read: {_reason(source, error)}"
        ) from error
    return found


def _reason(source: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    if Path(source).is_dir() or not isinstance(error, OSError):
        return f"{reason}; check its files."
    return f"it is no folder here, and the Hub did not give it ({reason}); check the spelling and the connection."


def load_tokenizer(source: str, argument: str, **options: Any) -> Any:
    """The tokenizer of a model that [`find_model`] found.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if lacks_tokenizer(source) and not options.get("gguf_file"):
        raise ValueError(
            f"{argument} ({source}) holds no tokenizer: save that of the base model there "
            "(`AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)`)."
        )
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # of the tokenizers library, which raises plain ones
        raise ValueError(f"the tokenizer of {argument} ({source}) is not loaded: {_reason(source, error)}") from error


def lacks_tokenizer(source: str) -> bool:
    """Whether a folder has no file of a tokenizer; of a name on the Hub nothing is known."""
    path = Path(source)
    return path.is_dir() and not any((path / name).exists() for name in _TOKENIZER_FILES)


def load_base(source: str, gguf_file: str | None) -> Any:
    """The causal language model of a folder or a name, on attention without a `T x T` mask."""
    import transformers

    keys: dict[str, Any] = {"attn_implementation": "packed"}
    if gguf_file:
        keys["gguf_file"] = gguf_file
        if hasattr(transformers, "GgufConfig"):  # without it, weights may stay packed and frozen
            keys["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(source, **keys)

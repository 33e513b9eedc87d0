"""Are the weights in a checkpoint whole, and are they this model's? Headers only; no weight is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..adapters.wrapped import unwrap
from ..config.test_time import TRAINED_WITH
from .checkpoint_record import read_json
from .shard_metadata import check_shards


_ADAPTER, _WHOLE = "adapter_model.safetensors", "model.safetensors"
_SHOWN = 3


def check_weights(model: torch.nn.Module | None, path: Path, is_fsdp: bool = False) -> None:
    """Raise `ValueError` unless `path` holds the weights of `model`.

    Args:
        model (`torch.nn.Module`, *optional*): `None`: only look whether the file is whole.
        path (`Path`): a checkpoint's folder, or one file of weights.
        is_fsdp (`bool`): whether the run is under FSDP. Otherwise shards of such a run are refused and not opened.
    """
    if model is None:
        _read_header(path)
        return
    if isinstance(model, torch.nn.Sequential):
        _check_modules(model, path)
        return
    _check_kind(model, path / "config.json")
    is_adapter = hasattr(model, "peft_config")
    sharded = path / "pytorch_model_fsdp_0"
    if sharded.is_dir() and not is_fsdp:
        raise ValueError(
            f"`{sharded}` holds the shards of a run under FSDP, and this run is under none: turn FSDP on, or merge "
            "them with `accelerate merge-weights` and train anew from the result."
        )
    if sharded.is_dir():
        wanted = _expected_adapter(model) if is_adapter else _expected(model)
        _compare(sharded, _read_distributed(sharded, "model."), wanted)
        optimizer = path / "optimizer_0"
        if not (optimizer / ".metadata").is_file():
            raise ValueError(f"`{optimizer / '.metadata'}` is missing: the optimizer would start anew.")
        _read_distributed(optimizer, "")
        return
    name = _ADAPTER if is_adapter else _WHOLE
    index = path / f"{name}.index.json"
    if (path / name).is_file():
        wanted = _expected_adapter(model) if is_adapter else _as_saved(model)
        _compare(path / name, _read_header(path / name), wanted)
    elif index.is_file():
        found: dict[str, Any] = {}
        for part in sorted(set(read_index(index).values())):
            found |= _read_header(path / part)
        _compare(index, found, _as_saved(model))
    elif not any(path.glob("pytorch_model*.bin")) and not any(path.glob(f"*/{_ADAPTER}")):
        kind = "an adapter (PEFT)" if is_adapter else "a whole model"
        raise ValueError(
            f"`{path / name}` is missing, and the run trains {kind}: resume from a checkpoint that this run saved."
        )


def _check_modules(model: torch.nn.Sequential, path: Path) -> None:
    """The same for a sentence-transformer, whose modules have a folder each, named in `modules.json`."""
    listed = path / "modules.json"
    folders = [path / entry["path"] for entry in read_json(listed, list)]
    modules = list(model.children())
    if len(folders) != len(modules):
        raise ValueError(
            f"`{listed}` lists {len(folders)} modules, and this run trains {len(modules)}: resume from a checkpoint "
            "of the same model."
        )
    for module, folder in zip(modules, folders):
        if hasattr(getattr(module, "model", None), "config"):
            check_weights(module.model, folder)
        elif module.state_dict():
            _compare(folder / _WHOLE, _read_header(folder / _WHOLE), _expected(module))


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by `*.index.json`; `ValueError` unless all of them are there and hold what it says."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(part, str) for part in names.values()):
        raise ValueError(f"`{path}` names no file for each tensor (`weight_map`): resume from another checkpoint.")
    for part in sorted(set(names.values())):
        if part.endswith(".safetensors"):
            found = _read_header(path.parent / part)
            lost = [name for name, file in names.items() if file == part and name not in found]
            if lost:
                raise ValueError(f"`{path.parent / part}` lacks `{lost[0]}`, against `{path}`: resume from another.")
        elif not (path.parent / part).is_file():
            raise ValueError(f"`{path.parent / part}` is missing, and `{path}` names it: resume from another one.")
    return names


def _check_kind(model: torch.nn.Module, path: Path) -> None:
    config = getattr(unwrap(model), "config", None)
    if config is None or not path.is_file():
        return
    content = read_json(path)
    saved = content.get("model_type")
    if saved != config.model_type:
        raise ValueError(
            f"`{path}` describes a model of type {saved!r}, and this run trains {config.model_type!r}: resume from a "
            "checkpoint of the same model."
        )
    there, here = content.get("ttt") or {}, getattr(config, "ttt", None) or {}
    other = next((name for name in TRAINED_WITH if there.get(name) != here.get(name)), None)
    if other is not None:
        raise ValueError(
            f"`{path}` says that the checkpoint was trained with `{other}` {there.get(other)!r}, but this model has "
            f"`{other}` {here.get(other)!r}: resume with the checkpoint's settings, or start anew."
        )


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`{path}` is missing, cut off or damaged ({error}): resume from another checkpoint."
        ) from error


def _read_distributed(folder: Path, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes in a folder of torch's distributed checkpoints, after a look at its files."""
    sizes = check_shards(folder).state_dict_metadata.items()
    return {name.removeprefix(prefix): tuple(entry.size) for name, entry in sizes if hasattr(entry, "size")}


def _expected(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], object]]:
    """Shape and place in memory of every tensor that a checkpoint of `model` may hold."""
    skipped = set(getattr(unwrap(model), "_keys_to_ignore_on_save", None) or ())
    state = model.state_dict().items()
    return {name: (tuple(tensor.shape), tensor.data_ptr()) for name, tensor in state if name not in skipped}


def _as_saved(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], object]]:
    """The same by the names under which transformers saves them: experts that a model stacks are saved one by one."""
    expected, inner = _expected(model), unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        return expected
    sizes = {name: torch.empty(shape, device="meta") for name, (shape, _) in expected.items()}
    saved = revert_weight_conversion(inner, sizes)
    # A tensor that is saved under another name shares its memory with none.
    places = {name: expected[name][1] if name in expected else name for name in saved}
    return {name: (tuple(tensor.shape), places[name]) for name, tensor in saved.items()}


def load_renamed(model: torch.nn.Module, path: Path) -> None:
    """Load the tensors of a checkpoint that transformers' trainers leave out, since they are saved by other names.

    They load what is named alike and only warn of the rest, so stacked experts would stay as they were initialised.

    Args:
        model (`torch.nn.Module`): wrapped or not; its weights are replaced in place.
        path (`Path`): a checkpoint's folder that `check_weights` has accepted.

    Memory: a second copy of the weights on the CPU for a moment, for models with such tensors only.
    """
    inner = unwrap(model)
    is_whole = (path / _WHOLE).is_file() or (path / f"{_WHOLE}.index.json").is_file()
    if not isinstance(inner, PreTrainedModel) or hasattr(model, "peft_config") or not is_whole:
        return
    if _as_saved(inner).keys() == _expected(inner).keys():
        return
    settings = {"config": copy.deepcopy(inner.config), "dtype": inner.dtype, "attn_implementation": "eager"}
    loaded = type(inner).from_pretrained(path, **settings)
    inner.load_state_dict(loaded.state_dict())


def _expected_adapter(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], object]]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0]).items()
    return {name: (tuple(tensor.shape), tensor.data_ptr()) for name, tensor in state}


def _compare(path: Path, found: dict[str, tuple[int, ...]], expected: dict) -> None:
    other = [name for name in found if name not in expected]
    there = {place for name, (_, place) in expected.items() if name in found}  # tied weights are saved under one name
    lost = [name for name, (_, place) in expected.items() if name not in found and place not in there]
    for names, words in ((lost, "lacks"), (other, "has, and the model lacks,")):
        if names:
            shown = ", ".join(f"`{name}`" for name in names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise ValueError(
                f"`{path}` is of another model: it {words} {shown}; resume from a checkpoint of the same model."
            )
    for name, shape in found.items():
        if shape != expected[name][0]:
            raise ValueError(
                f"`{path}` is of another model: `{name}` has shape {shape} there and {expected[name][0]} here; resume "
                "from a checkpoint of the same model."
            )

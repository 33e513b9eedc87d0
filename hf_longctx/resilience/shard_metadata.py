"""The `.metadata` of torch's distributed checkpoints, and what else of them is pickled, read without executing it.

torch reads `.metadata` with plain `pickle`, and entries that are no tensors with `torch.load(weights_only=False)`:
either would run what a stranger put there. Here both are read first, with the classes that such files need and no
others, and torch gets to see them only if that went well.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata


_METADATA = "torch.distributed.checkpoint.metadata"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"  # torch before 2.3 kept two of them there
_ALLOWED = {
    *(
        (_METADATA, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (_OLD, "TensorProperties"),
    (_OLD, "MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(
        (module, f"{kind}Path")
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "PurePosix", "Windows", "PureWindows")
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(f"it names `{module}.{name}`, which no such file needs")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """What `.metadata` says, from classes of an allow-list alone.

    Raises:
        ValueError: it is missing or damaged, or names anything that could be executed.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        _check_types(metadata)
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ValueError(
            f"`{path}` is missing or damaged ({str(error) or type(error).__name__}): resume from another checkpoint."
        ) from error
    return metadata


def _check_types(metadata: Metadata) -> None:
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise pickle.UnpicklingError(f"it describes `{name}` by a {type(entry).__name__}")
    for index, part in metadata.storage_data.items():
        file, *numbers = part.relative_path, part.offset, part.length
        if not isinstance(index.fqn, str) or not isinstance(file, str) or any(type(n) is not int for n in numbers):
            raise pickle.UnpicklingError(f"it places `{index.fqn}` at {file!r}, {numbers}")


def check_shards(folder: Path) -> Metadata:
    """Raise `ValueError` unless the files that `.metadata` names are there, long enough, and hold data alone.

    Args:
        folder (`Path`): such as `pytorch_model_fsdp_0` or `optimizer_0`.

    Returns:
        `Metadata`: what `.metadata` says.
    """
    metadata = read_metadata(folder)
    for index, part in metadata.storage_data.items():
        path = folder / part.relative_path
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"`{folder / '.metadata'}` names `{path}`, out of its folder: resume from another one.")
        size = path.stat().st_size if path.is_file() else 0
        if part.offset < 0 or part.length < 0 or size < part.offset + part.length:
            raise ValueError(
                f"`{path}` has {size} bytes, fewer than its `.metadata` says: resume from another checkpoint."
            )
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            _check_bytes(path, index.fqn, part)
    return metadata


def _check_bytes(path: Path, name: str, part: Any) -> None:
    """Numbers, words and lists of an optimizer's state are pickled, and read so by torch."""
    try:
        if getattr(part, "transform_descriptors", None):
            raise ValueError("it is compressed, so it cannot be read before torch does")
        with path.open("rb") as file:
            file.seek(part.offset)
            torch.load(io.BytesIO(file.read(part.length)), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`{path}` holds `{name}` in a form that could execute code when torch reads it, or is damaged "
            f"({reason}): resume from another checkpoint."
        ) from error

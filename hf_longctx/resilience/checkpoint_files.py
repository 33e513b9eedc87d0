"""Is a checkpoint whole? Its record answers where there is one; the files themselves say what they can in any case."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

from transformers import TrainerState

from .checkpoint_record import UNFINISHED, check_record, read_json
from .checkpoint_weights import check_weights, read_index


logger = logging.getLogger(__name__)

REPLACED = ".replaced"  # the end of a checkpoint's name while it is written anew
_TORCH_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
_TORCH_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")  # in the folders of modules and adapters too
_JSON_FILES = {"config.json": dict, "adapter_config.json": dict, "modules.json": list}


def check_whole(folder: Path, share: tuple[int, int] | None = (0, 1)) -> None:
    """Raise `ValueError` unless every file that can be judged alone is whole.

    Args:
        folder (`Path`): a checkpoint.
        share (`tuple[int, int]`, *optional*): which share of the files is read to the end; see [`check_record`].
            `None`: none, headers and sizes only.
    """
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint` ('{folder}') is not a folder: name one that a run saved.")
    if (folder / UNFINISHED).is_file():
        raise ValueError(
            f"`{folder / UNFINISHED}` says that the run ended while this checkpoint was written: resume from an "
            "earlier one; with `resume_from_checkpoint=True` the newest whole one is taken."
        )
    _check_state(folder / "trainer_state.json")
    torch_files = [path for pattern in _TORCH_FILES for path in folder.glob(pattern)]
    torch_files += [path for pattern in _TORCH_WEIGHTS for path in folder.rglob(pattern)]
    for path in torch_files:
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"`{path}` ({path.stat().st_size} bytes) is cut off or was not written by torch: resume from another "
                "checkpoint."
            )
    for path in folder.rglob("*.safetensors"):
        check_weights(None, path)
    for name, kind in _JSON_FILES.items():
        for path in folder.rglob(name):
            read_json(path, kind)
    for path in (path for kind in ("safetensors", "bin") for path in folder.glob(f"*.{kind}.index.json")):
        if not path.with_name(path.name.removesuffix(".index.json")).is_file():  # otherwise nobody reads it
            read_index(path)
    if not check_record(folder, share) and share is not None and share[0] == 0:
        for path in torch_files:
            _check_sums(path)


def _check_state(path: Path) -> None:
    step = read_json(path).get("global_step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"`{path}` has no `global_step`: resume from another checkpoint.")
    try:
        TrainerState.load_from_json(str(path))
    except Exception as error:  # a field that is of another kind, or none of transformers'
        raise ValueError(f"`{path}` is no state of a trainer ({error}): resume from another checkpoint.") from error


def _check_sums(path: Path) -> None:
    """The checksums that torch writes into its files, which it does not look at when it reads them."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.CRC == 0:  # `torch.serialization.set_crc32_options(False)`, or an empty entry
                    continue
                with archive.open(entry) as content:
                    while content.read(1 << 20):
                        pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"`{path}` is damaged ({error}): resume from another checkpoint.") from error


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders of checkpoints, by step, the newest last."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and by_step(path.name)[0] >= 0]
    return sorted(found, key=lambda path: by_step(path.name))


def by_step(name: str) -> tuple[int, bool]:
    """The place of a checkpoint's name in the order of steps; below 0 for another folder's."""
    number = name.removeprefix("checkpoint-").removesuffix(REPLACED)
    return int(number) if number.isdecimal() else -1, not name.endswith(REPLACED)


def last_whole_checkpoint(output_dir: Path, warn: bool = False) -> Path | None:
    """The newest checkpoint whose files are whole."""
    for folder in reversed(checkpoints_in(output_dir)):
        try:
            check_whole(folder)
            return folder
        except ValueError as error:
            if warn:
                logger.warning(f"`{folder}` is passed over: {error}")
    return None

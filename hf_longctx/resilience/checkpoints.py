"""Checkpoints that are whole or are not taken for one.

A checkpoint carries transformers' mark of an unfinished one until every rank has written its part, all of it is on the
disk and its record is made; older checkpoints go after that. So what ends the run in between leaves nothing that a
later run could mistake, and never less than one whole checkpoint. Before a run is resumed, all files are compared with
the record, and their headers with the run: are they there, as they were saved, of this model, and of a run that drew
the same rows?
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .checkpoint_files import REPLACED, by_step, check_whole, checkpoints_in, last_whole_checkpoint
from .checkpoint_record import UNFINISHED, check_record, sync, sync_folders, write_record
from .checkpoint_weights import check_weights
from .replicas import has_dropout
from .rotation import rotate_checkpoints
from .run_facts import check_rows, run_facts
from .shard_metadata import check_shards


logger = logging.getLogger(__name__)

_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*")
_OWN_FILES = ("rng_state_{}.pth", "*_rank{}.bin", "*/__{}_*.distcp")  # what a rank alone writes, by its number


def write_checkpoint(trainer, folder: Path, write: Callable[[], None], limit: int | None = None) -> None:
    """Call transformers' `write` so that `folder` counts as a checkpoint only once all of it is there, on all ranks.

    Args:
        trainer: in training.
        folder (`Path`): where `write` puts it.
        write (`Callable`): deletes no other checkpoint.
        limit (`int`, *optional*): `save_total_limit`.

    Raises:
        RuntimeError: a file could not be written; what was written is removed, and the last whole checkpoint named.

    Communication: three barriers.
    """
    writes = trainer.args.should_save
    with _removed_if_it_fails(trainer, folder):
        if writes:
            _begin(folder)
    _wait(trainer)  # nobody writes into a folder that is still being emptied
    with _removed_if_it_fails(trainer, folder):
        write()
        own = [pattern.format(trainer.args.process_index) for pattern in _OWN_FILES]
        sync(path for pattern in own for path in folder.glob(pattern))
    _wait(trainer)
    with _removed_if_it_fails(trainer, folder):
        if writes:
            write_record(folder, run_facts(trainer))
            (folder / UNFINISHED).unlink(missing_ok=True)
            sync_folders(folder)
    _wait(trainer)  # before it is whole on every node, no node may lose an older one
    if writes:
        shutil.rmtree(_replaced(folder), ignore_errors=True)
        rotate_checkpoints(folder, limit, trainer.state.best_model_checkpoint)


def _begin(folder: Path) -> None:
    """An empty folder with the mark. A checkpoint that was there stays, under another name, until it is whole."""
    if folder.exists() and not (folder / UNFINISHED).exists():
        shutil.rmtree(_replaced(folder), ignore_errors=True)
        folder.rename(_replaced(folder))
    shutil.rmtree(folder, ignore_errors=True)  # parts of an attempt with other ranks would count as its own
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / UNFINISHED
    mark.write_text("Some file of this checkpoint may be missing or cut off.\n", encoding="utf-8")
    sync([mark])
    sync_folders(folder)


def _replaced(folder: Path) -> Path:
    return folder.with_name(folder.name + REPLACED)


@contextlib.contextmanager
def _removed_if_it_fails(trainer, folder: Path) -> Iterator[None]:
    writes = trainer.args.should_save
    try:
        yield
    except Exception as error:  # safetensors, torch and the system each have their own for a full disk
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
            if _replaced(folder).is_dir() and not folder.exists():
                _replaced(folder).rename(folder)
        last = last_whole_checkpoint(folder.parent)
        state = "removed" if writes else "marked unfinished"
        rest = f"The last whole checkpoint is `{last}`: make room and resume from it." if last else "It was the first."
        raise RuntimeError(
            f"`{folder}` could not be written by rank {trainer.args.process_index} "
            f"({type(error).__name__}: {_first_line(error)}); it is {state}. {rest}"
        ) from error


def _wait(trainer) -> None:
    if trainer.args.world_size > 1:
        dist.barrier()


def choose_checkpoint(trainer, wanted: str | bool | None) -> str | None:
    """The folder to resume from, proven whole on every rank.

    Args:
        trainer: built, not yet training.
        wanted (`str` or `bool`, *optional*): as for transformers' `train`. True: the newest that is whole in
            `output_dir`, on all ranks; newer ones that are not are named in a warning.

    Raises:
        ValueError: on all ranks alike, with the file and what is wrong with it.

    Communication: two gathers of a short message for each checkpoint that is looked at, and two for the chosen one.
    """
    if not wanted:
        return None
    if wanted is True:
        folder = _newest_everywhere(trainer)
    else:
        folder = Path(wanted)
        _refuse_everywhere(_faults(trainer, folder, _check_named))
    if not trainer.is_deepspeed_enabled:
        _refuse_everywhere(_faults(trainer, folder, _check_run))
    return str(folder)


def prove_best(trainer, folder: str | None) -> None:
    """Raise `ValueError` on all ranks unless the checkpoint that `load_best_model_at_end` loads is as it was saved."""
    if folder is not None:
        _refuse_everywhere(_faults(trainer, Path(folder), _check_best))


def _newest_everywhere(trainer) -> Path:
    output_dir = Path(trainer.args.output_dir)
    names = _gather(trainer, [folder.name for folder in checkpoints_in(output_dir)])
    newest: dict[int, str] = {}
    cause = None
    for name in sorted({name for found in names for name in found}, key=by_step, reverse=True):
        faults = _faults(trainer, output_dir / name, _check_resumable)
        seen = _first(faults)
        if seen is None:
            return output_dir / name
        newest |= {rank: name for rank, fault in enumerate(faults) if fault is None and rank not in newest}
        cause = cause or seen
        if trainer.args.process_index == 0:
            logger.warning(f"`{output_dir / name}` is passed over: {seen}")
    if newest:
        found = ", ".join(f"rank {rank}: {newest.get(rank)}" for rank in range(len(names)))
        raise ValueError(
            f"the ranks found different newest checkpoints ({found}): give all nodes the same `output_dir`, or name "
            "one checkpoint in `resume_from_checkpoint`."
        )
    raise ValueError(
        f"`resume_from_checkpoint` is True, but `output_dir` ('{output_dir}') holds no whole checkpoint: start anew, "
        f"or name the folder.{'' if cause is None else ' The newest: ' + cause}"
    )


def _faults(trainer, folder: Path, check: Callable[[Any, Path, tuple[int, int]], None]) -> list[str | None]:
    """What `check` finds, by rank. Ranks that see one folder divide its files, and have found what one of them has.

    Communication: two gathers of a short message.
    """
    try:
        state = folder.stat()
        seen = (socket.gethostname(), state.st_dev, state.st_ino, state.st_mtime_ns)
    except OSError:
        seen = None
    places = _gather(trainer, seen)
    rank = trainer.args.process_index if len(places) > 1 else 0
    sharers = [other for other, place in enumerate(places) if place == seen]
    fault = None
    try:
        check(trainer, folder, (sharers.index(rank), len(sharers)))
    except (ValueError, OSError) as error:
        fault = str(error)
    faults = _gather(trainer, fault)
    return [
        fault or next((faults[k] for k, other in enumerate(places) if other == place and faults[k] is not None), None)
        for place, fault in zip(places, faults)
    ]


def _first(faults: list[str | None]) -> str | None:
    """What the first rank with a fault has seen; `faults` has an entry a rank."""
    seen = [(rank, message) for rank, message in enumerate(faults) if message is not None]
    if not seen:
        return None
    rank, message = seen[0]
    return message if len(seen) == len(faults) else f"{message} (seen by rank {rank})"


def _refuse_everywhere(faults: list[str | None]) -> None:
    message = _first(faults)
    if message is not None:
        raise ValueError(message)


def _check_named(trainer, folder: Path, share: tuple[int, int]) -> None:
    """A folder that the user named. DeepSpeed's own, without our record, is DeepSpeed's matter."""
    if trainer.is_deepspeed_enabled and not check_record(folder, share=None):
        return
    _check_resumable(trainer, folder, share)


def _check_best(trainer, folder: Path, share: tuple[int, int]) -> None:
    if folder.is_dir() and check_record(folder, share=None):
        check_whole(folder, share)


def _check_resumable(trainer, folder: Path, share: tuple[int, int]) -> None:
    """Raise `ValueError` unless `folder` is whole and holds the state of an optimizer."""
    check_whole(folder, share)
    shards = folder / "pytorch_model_fsdp_0"
    if trainer.is_deepspeed_enabled or (shards.is_dir() and not trainer.is_fsdp_enabled):
        return  # the latter is of another kind of run, which `_check_run` refuses
    optimizers = _OPTIMIZERS if trainer.is_fsdp_enabled else _OPTIMIZERS[:1]
    for names in (optimizers, ("scheduler.pt",)):
        if not any(path for name in names for path in folder.glob(name)):
            raise ValueError(
                f"`{folder / names[0]}` is missing, so the optimizer would start anew: a checkpoint saved with "
                "`save_only_model` cannot be resumed; load its weights with `from_pretrained` and train anew."
            )
    if trainer.is_fsdp_enabled:
        for path in folder.glob("*/.metadata"):
            check_shards(path.parent)


def _check_run(trainer, folder: Path, share: tuple[int, int]) -> None:
    """Raise `ValueError` unless `folder` can continue this run, as this rank sees it."""
    check_weights(trainer.model, folder, trainer.is_fsdp_enabled)
    check_rows(trainer, folder)
    args, num_random = trainer.args, len(list(folder.glob("rng_state*.pth")))
    differs = num_random != args.world_size and has_dropout(trainer.model)
    if args.process_index == 0 and (differs or num_random == 0):
        logger.warning(
            f"`{folder}` holds the random state of {num_random} processes, and {args.world_size} run: dropout draws "
            "other numbers than it would have."
        )


def _gather(trainer, value: Any) -> list[Any]:
    everywhere = [value]
    if trainer.args.world_size > 1:
        everywhere = [None] * trainer.args.world_size
        dist.all_gather_object(everywhere, value)
    return everywhere


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

"""Checkpoints that are whole or are not taken for one.

A checkpoint carries transformers' mark of an unfinished one until every rank has written its part, so what ends the
run in between leaves nothing that a later run could mistake. Before a run is resumed, its files are looked at, without
reading the numbers in them: are they there, whole, of this model, and of a run that drew the same rows?
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..data.packing.collator import fills_rows
from ..data.streams import split_stream
from .checkpoint_weights import check_weights, read_json
from .replicas import has_dropout


logger = logging.getLogger(__name__)

UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' own name for it
RUN_FILE = "hf_longctx.json"
_NOT_COMPARED = ("world_size", "sequence_parallel_size", "split", "epoch_rows", "draws_rows")
_TORCH_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin")


def write_checkpoint(trainer, folder: Path, write: Callable[[], None]) -> None:
    """Call transformers' `write` so that `folder` counts as a checkpoint only once all of it is there, on all ranks.

    Raises:
        RuntimeError: a file could not be written; what was written is removed, and the last whole checkpoint named.

    Communication: a barrier.
    """
    mark, writes = folder / UNFINISHED, trainer.args.should_save
    try:
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text("Some file of this checkpoint may be missing or cut off.\n", encoding="utf-8")
            facts = json.dumps(run_facts(trainer), indent=2)
            (folder / RUN_FILE).write_text(facts + "\n", encoding="utf-8")
        write()
    except Exception as error:  # safetensors, torch and the system each have their own for a full disk
        if writes and _is_written(folder, mark):
            raise  # it came after the files: an upload, the removal of an older checkpoint
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
        last = last_whole_checkpoint(folder.parent)
        state = "removed" if writes else "marked unfinished"
        rest = f"The last whole checkpoint is `{last}`: make room and resume from it." if last else "It was the first."
        raise RuntimeError(
            f"`{folder}` could not be written by rank {trainer.args.process_index} "
            f"({type(error).__name__}: {_first_line(error)}); it is {state}. {rest}"
        ) from error
    if trainer.args.world_size > 1:
        dist.barrier()
    if writes:
        mark.unlink(missing_ok=True)


def _is_written(folder: Path, mark: Path) -> bool:
    mark.unlink(missing_ok=True)
    try:
        check_whole(folder)
    except ValueError:
        return False
    return True


def run_facts(trainer) -> dict[str, Any]:
    """What decides which rows a step draws, in addition to the step's number; and how many processes ran."""
    args, groups = trainer.args, trainer.mesh.data_parallel_size
    rows = args.train_batch_size * groups
    strategy = getattr(args, "train_sampling_strategy", "random")
    num_rows, sources = _count_rows(trainer)
    is_sized = num_rows is not None
    packs = fills_rows(trainer.data_collator)
    is_dealt = trainer.reads_own_shards and split_stream(trainer.train_dataset, trainer.mesh) is not None
    loader = trainer.callback_handler.train_dataloader if is_sized and sources is None else None
    return {
        "world_size": args.world_size,
        "sequence_parallel_size": trainer.mesh.sequence_parallel_size,
        "split": [args.train_batch_size, groups, args.gradient_accumulation_steps],
        "epoch_rows": None if loader is None else len(loader.dataset),
        "rows_per_optimizer_step": rows * args.gradient_accumulation_steps,
        "num_rows": num_rows,
        "sources": sources,
        "draws_rows": trainer._draws_rows,
        "seed": trainer.data_seed,
        "train_sampling_strategy": strategy,
        "max_tokens": trainer.data_collator.max_tokens if packs else None,
        # These orders are made for so many rows at a time, or for so many groups.
        "balanced_rows": rows if packs and not is_dealt and strategy == "random" else None,
        "sorted_rows": args.train_batch_size * args.gradient_accumulation_steps
        if strategy == "group_by_length"
        else None,
        "stream_shards": groups if is_dealt else None,
    }


def _count_rows(trainer) -> tuple[int | None, dict[str, object] | None]:
    """The rows of the data set, and what decides how often each of several sources is drawn."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Mapping):
        return len(dataset) if hasattr(dataset, "__len__") else None, None
    rows = {name: len(source) if hasattr(source, "__len__") else None for name, source in dataset.items()}
    sources = asdict(trainer.sources) | {"rows": rows}
    counts = [count for count in rows.values() if count is not None]
    return sum(counts) if len(counts) == len(rows) else None, sources


def choose_checkpoint(trainer, wanted: str | bool | None) -> str | None:
    """The folder to resume from, proven whole on every rank.

    Args:
        trainer: built, not yet training.
        wanted (`str` or `bool`, *optional*): as for transformers' `train`. True: the newest that is whole in
            `output_dir`; newer ones that are not are named in a warning.

    Raises:
        ValueError: on all ranks alike, with the file and what is wrong with it.

    Communication: two gathers of a short message.
    """
    if not wanted:
        return None
    if wanted is True:
        found = last_whole_checkpoint(Path(trainer.args.output_dir), warn=trainer.args.process_index == 0)
        everywhere = _gather(trainer, None if found is None else str(found))
        if len(set(everywhere)) > 1:
            raise ValueError(
                "the ranks found different newest checkpoints "
                f"({', '.join(f'rank {rank}: {folder}' for rank, folder in enumerate(everywhere))}): give all nodes "
                "the same `output_dir`, or name one checkpoint in `resume_from_checkpoint`."
            )
        if found is None:
            raise ValueError(
                f"`resume_from_checkpoint` is True, but `output_dir` ('{trainer.args.output_dir}') holds no whole "
                "checkpoint: start anew, or name the folder."
            )
        wanted = str(found)
    fault = None
    try:
        if not trainer.is_deepspeed_enabled:
            check_checkpoint(trainer, Path(wanted))
    except ValueError as error:
        fault = str(error)
    _refuse_everywhere(_gather(trainer, fault))
    return wanted


def _refuse_everywhere(faults: list[str | None]) -> None:
    """Raise on all ranks what the first rank with a fault has seen; `faults` has an entry a rank."""
    seen = [(rank, message) for rank, message in enumerate(faults) if message is not None]
    if seen:
        rank, message = seen[0]
        raise ValueError(message if len(seen) == len(faults) else f"{message} (seen by rank {rank})")


def check_checkpoint(trainer, folder: Path) -> None:
    """Raise `ValueError` unless `folder` can continue this run, as this rank sees it."""
    check_whole(folder)
    args = trainer.args
    check_weights(trainer.model, folder)
    if not trainer.is_fsdp_enabled:
        for name in ("optimizer.pt", "scheduler.pt"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"`{folder / name}` is missing, so the optimizer would start anew: a checkpoint saved with "
                    "`save_only_model` cannot be resumed; load its weights with `from_pretrained` and train anew."
                )
    _check_rows(trainer, folder)
    num_random = len(list(folder.glob("rng_state*.pth")))
    if num_random != args.world_size and args.process_index == 0 and has_dropout(trainer.model):
        logger.warning(
            f"`{folder}` holds the random state of {num_random} processes, and {args.world_size} run: dropout draws "
            "other numbers than it would have."
        )


def check_whole(folder: Path) -> None:
    """Raise `ValueError` unless every file that can be judged alone is whole."""
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint` ('{folder}') is not a folder: name one that a run saved.")
    if (folder / UNFINISHED).is_file():
        raise ValueError(
            f"`{folder / UNFINISHED}` says that the run ended while this checkpoint was written: resume from an "
            "earlier one; with `resume_from_checkpoint=True` the newest whole one is taken."
        )
    state = folder / "trainer_state.json"
    if not isinstance(read_json(state).get("global_step"), int):
        raise ValueError(f"`{state}` has no `global_step`: resume from another checkpoint.")
    for path in (path for pattern in _TORCH_FILES for path in folder.glob(pattern)):
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"`{path}` ({path.stat().st_size} bytes) is cut off or was not written by torch: resume from another "
                "checkpoint."
            )
    for path in folder.glob("*.safetensors"):
        check_weights(None, path)


def last_whole_checkpoint(output_dir: Path, warn: bool = False) -> Path | None:
    """The newest checkpoint whose files are whole."""
    if not output_dir.is_dir():
        return None
    folders = sorted(
        (path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()),
        key=lambda path: -int(path.name.removeprefix("checkpoint-")),
    )
    for folder in folders:
        try:
            check_whole(folder)
            return folder
        except ValueError as error:
            if warn:
                logger.warning(f"`{folder}` is passed over: {error}")
    return None


def _check_rows(trainer, folder: Path) -> None:
    path = folder / RUN_FILE
    if trainer.args.ignore_data_skip or not path.is_file():
        return
    saved = read_json(path)
    if saved.get("draws_rows") and trainer.args.process_index == 0:
        logger.warning(
            f"the collator or data set of the run that saved `{folder}` draws random numbers: training goes on with "
            "the same rows, but the draws are not those of the uninterrupted run, because the trainer fetches ahead "
            "of the random state it saves."
        )
    facts, had = run_facts(trainer), saved.get("rows_per_optimizer_step")
    if saved.get("epoch_rows") and had and saved["epoch_rows"] % had and saved["split"] != facts["split"]:
        raise ValueError(
            f"`{path}` says that an epoch has {saved['epoch_rows']} rows, which steps of {had} do not divide: how its "
            "last step is filled depends on rows a device, groups and accumulation steps. Keep them at "
            f"{', '.join(map(str, saved['split']))} (this run has {', '.join(map(str, facts['split']))}), or set "
            "`ignore_data_skip=True` to begin the data anew."
        )
    for name, value in facts.items():
        if name not in _NOT_COMPARED and saved.get(name, value) != value:
            raise ValueError(
                f"`{path}` says `{name}` {saved[name]}, and this run has {value}: other rows would be drawn than by "
                f"the run it continues, which had {saved.get('world_size')} processes, `sequence_parallel_size` "
                f"{saved.get('sequence_parallel_size')}. Keep it (`per_device_train_batch_size` times groups times "
                "`gradient_accumulation_steps` are the rows of a step), or set `ignore_data_skip=True` to begin the "
                "data anew."
            )


def _gather(trainer, value: object) -> list:
    everywhere = [value]
    if trainer.args.world_size > 1:
        everywhere = [None] * trainer.args.world_size
        dist.all_gather_object(everywhere, value)
    return everywhere


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

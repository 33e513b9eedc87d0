"""`save_total_limit`: which checkpoints are deleted once a new one is whole.

transformers deletes before it knows that, and goes by the time of the files, which a copy or a clock changes. Here the
step number decides, and unfinished or damaged folders go first.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from .checkpoint_files import check_whole, checkpoints_in


logger = logging.getLogger(__name__)


def rotate_checkpoints(written: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints next to `written`, which is whole, until `limit` are left.

    Never deleted: `written`, the newest that is whole, and `best`; so there may be more than `limit`.

    Args:
        written (`Path`): the checkpoint that this run has just written.
        limit (`int`, *optional*): `save_total_limit`. `None`, or no more than 0: all are kept.
        best (`str`, *optional*): the folder that `load_best_model_at_end` would load.
    """
    folders = checkpoints_in(written.parent)
    if limit is None or limit <= 0 or len(folders) <= limit:
        return
    whole = [folder for folder in folders if folder == written or _is_whole(folder)]
    kept = {written.resolve(), whole[-1].resolve()}
    if best is not None and Path(best).is_dir():
        kept.add(Path(best).resolve())
    if whole[-1] != written:
        logger.warning(
            f"`{whole[-1]}` is of an earlier run and has a later step than `{written.name}`: it is kept, and "
            "`resume_from_checkpoint=True` would take it. Remove it, or name the checkpoint to resume from."
        )
    num_left, num_kept = len(folders), max(limit, len(kept))
    for folder in [*(folder for folder in folders if folder not in whole), *whole]:
        if num_left <= num_kept:
            break
        if folder.resolve() not in kept:
            shutil.rmtree(folder, ignore_errors=True)
            num_left -= 1


def _is_whole(folder: Path) -> bool:
    try:
        check_whole(folder, share=None)
    except (ValueError, OSError):
        return False
    return True

"""`KillSwitch`: a file that ends a run, saved, after the same step on all ranks.

One process looks for it, and what it saw goes with the one decision of a step, so that no rank stops alone. Who may
create a file next to the run may end it, without an account on the machines or a signal to each of them.
Price: one look at the file a step, on one process.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .watch import Watch


logger = logging.getLogger(__name__)

NOTE = "stopped_by_kill_switch.txt"


class KillSwitch(Watch):
    """Once `file` exists, every rank saves after the same step and ends the run; a note in `output_dir` says so.

    A run that finds the file before its first step is refused, so jobs that wait in a queue end as well.

    Args:
        file (`str` or `Path`): looked at by the first process; relative to the folder that the run was started in.

    Raises:
        ValueError: `file` is empty.

    Communication: none of its own; one more number in the all-reduce that decides each step.
    """

    def __init__(self, file: str | os.PathLike) -> None:
        name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else ""
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise ValueError(f"`file` ({file!r}) must name a file: its existence ends the run.")
        self.file = Path(file)
        self.is_agreed = False
        self._note: str | None = None

    def settings(self) -> dict[str, object]:
        return {"file": os.fspath(self.file)}

    def is_thrown(self) -> bool:
        """Whether the file is there, as this process sees it; a file system that does not answer says no."""
        try:
            return self.file.exists()
        except OSError:
            return False

    def refuse(self, trainer: Any) -> None:
        self.is_agreed = False
        fault = [self._fault() if trainer.args.process_index == 0 else None]
        if trainer.args.world_size > 1:
            dist.broadcast_object_list(fault, src=0)
        if fault[0] == "there":
            raise ValueError(
                f"the file of `KillSwitch` ('{self.file}') is there, so the run does not start: remove it to train."
            )
        if fault[0] is not None:
            raise ValueError(
                f"the file of `KillSwitch` ('{self.file}') is in a folder that does not exist: make the folder first."
            )

    def _fault(self) -> str | None:
        if self.is_thrown():
            return "there"
        return None if self.file.absolute().parent.is_dir() else "no folder"

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not self.is_attached:
            raise RuntimeError(
                "`KillSwitch` needs a trainer of hf_longctx, which decides for all ranks at once: with another, each "
                "rank would look for itself."
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.is_agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            self._note = (
                f"`KillSwitch` ('{self.file}') ended the run after step {state.global_step}, saved in `{folder}`. "
                "Remove the file; `resume_from_checkpoint=True` goes on from there."
            )

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.is_agreed:
            control.should_save = control.should_evaluate = False  # saved at the end of its last step

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._note is not None and state.is_world_process_zero:
            logger.warning(self._note)
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}: {self._note}\n"
            Path(args.output_dir, NOTE).write_text(text, encoding="utf-8")
        self._note = None

"""Which rank failed, and why: every rank says it, also those that only lost the others.

A rank that raises leaves its cause in the process group's store, where ranks whose connection breaks look for it. A
rank that stops making progress leaves where it is, so that a hung collective is reported by rank and call before
torch's own timeout (`ddp_timeout`) ends the run without either.
Price: nothing until a quarter of `ddp_timeout` has gone by without progress; a sleeping thread.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from transformers import TrainerCallback

from .flight_recorder import describe_dump, uses_nccl


logger = logging.getLogger(__name__)

_LOST_OTHERS = ("connection", "broken pipe", "timed out", "timeout", "nccl", "socket", "gloo")
_WAITING_FILES = ("distributed_c10d.py",)


def clear_fault() -> None:
    """Clear what this rank reported about an earlier run."""
    if dist.is_available() and dist.is_initialized():
        _store().set(_key("fault", dist.get_rank()), "")


def report_fault(error: BaseException, step: int) -> None:
    """Log why this rank stops; if it only lost another rank, that one's cause."""
    try:
        _tell_fault(error, step)
    except RuntimeError as late:  # torch tells of a dead data worker from a signal handler, which may strike in here
        if not _lost_worker(late):
            raise
        _tell_fault(late, step)


def _tell_fault(error: BaseException, step: int) -> None:
    cause = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    if _lost_worker(error):
        cause = f"a data worker died, often for want of memory: set fewer `dataloader_num_workers` ({cause})"
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        logger.error(f"the run stops after step {step}: {cause}")
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    lost_others = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST_OTHERS)
    try:
        if not lost_others:
            _store().set(_key("fault", rank), cause)
            others = []
        else:
            others = [(other, _read("fault", other)) for other in range(size) if other != rank]
    except Exception as broken:  # the process that kept the store is gone as well
        others = []
        cause += f" (and the process group's store does not answer: {type(broken).__name__})"
    told = [f"rank {other} failed with {words}" for other, words in others if words]
    if told:
        logger.error(f"rank {rank} of {size} stops after step {step} because {'; '.join(told)}")
    elif lost_others:
        logger.error(
            f"rank {rank} of {size} stops after step {step}: it lost another rank, and none has reported why "
            f"({cause}). A process was killed (by the system for its memory, by the scheduler, with its machine) or "
            "hangs: the launcher's report names the first that ended."
        )
    else:
        logger.error(f"rank {rank} of {size} stops after step {step}: {cause}")


def _lost_worker(error: BaseException) -> bool:
    """Whether the data loader lost a worker: torch says so, wherever the signal meets this process, unless the loader
    was in the middle of receiving what the worker sent."""
    if "DataLoader worker" in str(error):
        return True
    files = (Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__))
    return isinstance(error, (ConnectionError, EOFError)) and "dataloader.py" in files


class HangWatch(TrainerCallback):
    """Says where every rank is when a run makes no progress for half of `ddp_timeout`.

    It ends nothing: torch's timeout does. Progress is a micro-batch, an optimizer step, an evaluation batch, a log or
    a checkpoint. On NCCL it names the file of torch's flight recorder, see [`describe_dump`].

    Communication: through the process group's store, and only when there is no progress.
    """

    def __init__(self) -> None:
        self._step, self._moved = 0, time.monotonic()
        self._ended: threading.Event | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.world_size == 1 or not dist.is_initialized():
            return
        self._move(args, state, control)
        _store().set(_key("place", dist.get_rank()), "")
        self._ended = threading.Event()
        facts = (dist.get_rank(), dist.get_world_size(), float(args.ddp_timeout), self._ended, threading.get_ident())
        threading.Thread(target=self._watch, args=facts, name="hf_longctx-hang-watch", daemon=True).start()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.end()

    def end(self) -> None:
        """Stop watching, also after an error."""
        if self._ended is not None:
            self._ended.set()

    def _move(self, args, state, control, **kwargs) -> None:
        self._step, self._moved = state.global_step, time.monotonic()

    on_step_begin = on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_log = on_save = _move

    def _watch(self, rank: int, size: int, timeout: float, ended: threading.Event, thread: int) -> None:
        is_told = False
        while not ended.wait(min(timeout / 20, 30.0)):
            idle = time.monotonic() - self._moved
            if idle < timeout / 4:
                is_told = False
                continue
            try:
                words, waits = where_is(thread)
                record = {"step": self._step, "words": words, "waits": waits}
                _store().set(_key("place", rank), json.dumps(record))
                if idle < timeout / 2 or is_told:
                    continue
                is_told = True
                places = {other: _read("place", other) for other in range(size)}
                dump = describe_dump(rank, since=time.time() - idle) if uses_nccl() else ""
            except Exception as error:  # a watch must not be what ends a run
                logger.warning(f"the watch for hung collectives on rank {rank} ends: {type(error).__name__}: {error}")
                return
            told = describe_hang({other: json.loads(text) for other, text in places.items() if text}, size, idle)
            logger.error(f"{told}; {dump}" if dump else told)


def describe_hang(places: dict[int, dict], size: int, idle: float) -> str:
    """One message about where all ranks are, the suspects first."""
    suspects = [rank for rank in range(size) if rank not in places or not places[rank]["waits"]]
    lines = []
    for rank in sorted(range(size), key=lambda rank: (rank not in suspects, rank)):
        place = places.get(rank)
        if place is None:
            lines.append(f"rank {rank} did not respond: its process is stopped, has ended, or holds the GIL")
        else:
            kind = "waits for the others" if place["waits"] else "is in no collective, so the others wait for it"
            lines.append(f"rank {rank}, after step {place['step']}, {kind}: {place['words']}")
    return f"no progress for {idle:.0f} s, and `ddp_timeout` will end the run: " + "; ".join(lines)


def where_is(thread: int) -> tuple[str, bool]:
    """Where the thread that trains is, and whether it waits in a collective. A backward may have its own threads."""
    stacks = {ident: traceback.extract_stack(frame) for ident, frame in sys._current_frames().items()}
    stacks.pop(threading.get_ident(), None)
    for ident in sorted(stacks, key=lambda ident: ident != thread):
        waiting = [frame for frame in stacks[ident] if Path(frame.filename).name in _WAITING_FILES]
        if waiting:
            outer = stacks[ident].index(waiting[0])
            return f"`{waiting[0].name}`, called {_frame(_outside_torch(stacks[ident][:outer]))}", True
    stack = stacks.get(thread)
    if not stack:
        return "nowhere: its thread has ended", False
    if stack[-1].name == "_engine_run_backward":
        return "backward, where DDP or FSDP reduces gradients", True
    own = _outside_torch(stack)
    return _frame(stack[-1]) + ("" if own is stack[-1] else f", called {_frame(own)}"), False


def _outside_torch(stack: list[traceback.FrameSummary]) -> traceback.FrameSummary:
    torch_folder = str(Path(torch.__file__).parent)
    return next((frame for frame in reversed(stack) if not frame.filename.startswith(torch_folder)), stack[-1])


def _frame(frame: traceback.FrameSummary) -> str:
    return f"in `{frame.name}` ({'/'.join(Path(frame.filename).parts[-3:])}, line {frame.lineno})"


def _store():
    return distributed_c10d._get_default_store()


def _key(kind: str, rank: int) -> str:
    return f"hf_longctx/{kind}/{rank}"


def _read(kind: str, rank: int) -> str:
    key = _key(kind, rank)
    return _store().get(key).decode() if _store().check([key]) else ""

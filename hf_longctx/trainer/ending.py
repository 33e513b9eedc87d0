"""The last line of a script: the process group ends before the interpreter does, so that a finished run exits."""

from __future__ import annotations

import gc
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def end_training(trained: Any) -> None:
    """Destroy the process groups after a run that has finished. Call it on every rank, as the script's last line.

    DDP's reducer owns the process group. Destroyed before it, the group stays alive until the interpreter takes the
    reducer down; the group then waits for its gloo threads and does not release the interpreter's lock, which such a
    thread may need to free the tensors of the last all-reduce. The process hangs forever or aborts. Here the reducer
    goes first, so the group ends at once, without the lock, and its threads with it. What else holds a group, such as
    a mesh in a variable of the script, keeps those threads to the end of the interpreter, but then releases the lock.

    Args:
        trained (`Trainer` or `torch.nn.Module`):
            the trainer that has trained, of any kind, or the model of a loop of your own, wrapped or not. Neither can
            train or evaluate after the call. A trainer's `model` and the weights stay.

    Communication: none. Without a process group only a trainer's trackers are finished and references dropped.
    """
    if isinstance(trained, nn.Module):
        _drop_reducer(trained)
        gc.collect()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        return
    _drop_reducer(trained.model_wrapped)
    trained.model_wrapped = trained.model
    vars(trained).pop("mesh", None)  # it holds the groups that share rows
    trained.accelerator.free_memory()  # loaders that it prepared may hold the mesh
    gc.collect()  # the wrapper is part of reference cycles
    trained.accelerator.end_training()


def _drop_reducer(model: nn.Module) -> None:
    # Not left to the collector: a loss or a variable of the script may hold the wrapper.
    if isinstance(model, DistributedDataParallel):
        for name in ("reducer", "logger"):  # the logger owns the reducer too
            vars(model).pop(name, None)

"""Run a trainer's own methods on tiny rows and leave no trace, also as if it were the only process.

What a user overrides may count, log or keep things. So attributes of the trainer are put back afterwards, containers
of plain values are copied for the time, and random numbers go on where they were.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..adapters.wrapped import unwrap
from ..parallel.mesh import SequenceMesh
from ..tiny_check import evaluation_mode
from .shifting_loss import ShiftingLoss


# What is defined here is the library's own, and its tests are ours.
_LIBRARIES = ("transformers", "trl", "hf_longctx", "accelerate", "torch", "peft")


def is_overridden(trainer: object, *names: str) -> bool:
    """Whether a class of the user's, a mixin between ours and the library's, or the instance defines a name."""
    for name in names:
        if name in vars(trainer):
            return True
        for base in type(trainer).__mro__:
            found = vars(base).get(name)
            if found is not None and not all(is_library(thing) for thing in (base, found)):
                return True
    return False


def is_library(thing: object) -> bool:
    """Whether a class or function is defined in a library that ours is tested with."""
    return (getattr(thing, "__module__", None) or "transformers").split(".")[0] in _LIBRARIES


@contextlib.contextmanager
def on_trial(trainer: Any, training: bool = True, **attributes: Any) -> Iterator[None]:
    """Run a block with other attributes on the trainer; everything is as before when it ends.

    Args:
        trainer: with a model and a mesh.
        training (`bool`, *optional*, defaults to `True`): what the model and the trainer say of themselves. The
            model's layers stay in evaluation mode, so nothing is dropped.
        attributes: set for the time of the block.
    """
    kept, cuda = dict(vars(trainer)), [trainer.args.device] if trainer.args.device.type == "cuda" else []
    plain = {name: copy.deepcopy(value) for name, value in kept.items() if _is_plain_container(value)}
    copies = {name: copy.copy(kept[name]) for name in ("state", "control") if name in kept}
    with evaluation_mode(trainer.model), torch.random.fork_rng(devices=cuda):
        for module in (trainer.model, unwrap(trainer.model)):
            module.training = training
        vars(trainer).update(
            plain | copies | {"is_in_train": training, "is_on_trial": True, "_checks_packing": False} | attributes
        )
        try:
            yield
        finally:
            vars(trainer).clear()
            vars(trainer).update(kept)


def one_process(trainer: Any) -> dict[str, Any]:
    """The attributes of a trainer that runs alone, on whole rows and with the user's own loss functions."""
    args = copy.copy(trainer.args)
    args.average_tokens_across_devices = False
    args.distributed_state = OneProcess(args.distributed_state)
    return {
        "args": args,
        "accelerator": OneProcess(trainer.accelerator),
        "mesh": SequenceMesh(1, 1, 0, 0),
        "shards_batches": False,
        "compute_loss_func": _unwrapped(trainer.compute_loss_func),
        "label_smoother": _unwrapped(trainer.label_smoother),
    }


def _unwrapped(loss: Any) -> Any:
    return loss.function if isinstance(loss, ShiftingLoss) else loss


class OneProcess:
    """An object of accelerate's as it is in a run of one process: what it gathers is what it got.

    Args:
        wrapped: everything else is its.
    """

    num_processes = world_size = 1
    process_index = local_process_index = 0

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def gather(self, tensor: Any) -> Any:
        return tensor

    def gather_for_metrics(self, input_data: Any, *args: Any, **kwargs: Any) -> Any:
        return input_data

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def pad_across_processes(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor


def _is_plain_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, set, deque, torch.Tensor)) and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(each) for key, each in value.items())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(map(_is_plain, value))
    if isinstance(value, torch.Tensor):
        return value.is_leaf and not value.requires_grad and value.numel() <= 4096
    return value is None or isinstance(value, (bool, int, float, str, bytes))

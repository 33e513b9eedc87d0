"""`ReplicaGuard`: ranks that must hold the same numbers do, to the bit, or the run stops and says which do not.

What is replicated drifts apart in silence: a callback that writes a weight on one rank, checkpoints that differ from
node to node, a device that computes wrongly. Each rank then trains its own model, and no loss shows it.

Price: every `every` steps one pass over parameters and optimizer state, which reads them once and copies nothing, and
one all-reduce of a few integers.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback


_LOWEST = torch.iinfo(torch.int64).min  # loses every maximum
_CHUNK = 2**20  # entries of a tensor that are compared at a time, once ranks are known to differ


class ReplicaGuard(TrainerCallback):
    """Compare what ranks must agree on, and raise on all of them if they do not.

    Compared, bit for bit:
    - parameters and optimizer state (moments, counters, learning rates) over all ranks, as DDP keeps them. Tensors
      that FSDP2 has cut differ by design and are left out; what it replicates is compared;
    - the optimizer step that a rank has reached;
    - torch's random state of the CPU and of the device over the ranks that share a row, if the model has dropout: all
      draw it from there. The order of rows needs no random state: the samplers are seeded, and a batch's rows are
      compared whenever it is bound to its group. Ranks of different groups may draw as they like.

    When: before the first step (so a resumed run is seen), every `every` steps, and after the last step.

    Args:
        every (`int`, *optional*, defaults to 100): optimizer steps between two comparisons.
        sequence_parallel_size (`int`, *optional*, defaults to 1): ranks that share a row.

    Raises:
        ValueError: `every` or `sequence_parallel_size` is not a positive integer.
        RuntimeError: on all ranks in the same step, with the first tensor that differs, the ranks and a value of each.

    Communication: an all-reduce of `3 + W / P` integers twice over; if ranks differ, a gather of all checksums and one
    broadcast of the tensor.
    """

    def __init__(self, *, every: int = 100, sequence_parallel_size: int = 1) -> None:
        for name, value in (("every", every), ("sequence_parallel_size", sequence_parallel_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` ({value!r}) must be a positive integer.")
        self.every, self.sequence_parallel_size = every, sequence_parallel_size
        self._compared_step: int | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self._compare(args, state, model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self._compare(args, state, model, optimizer)

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if state.global_step != self._compared_step:
            self._compare(args, state, model, optimizer)

    def _compare(self, args, state, model, optimizer) -> None:
        self._compared_step = state.global_step
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        tensors, facts = replicated(model, optimizer)
        facts = {"step": state.global_step, **facts}
        sums = dict(zip(tensors, checksums(list(tensors.values()), args.device)))
        drawn = random_state_hash(args.device) if has_dropout(model) else 0
        mine = [_hash(list(sums)), _hash(list(sums.values())), _hash(list(facts.items()))]
        groups = [_LOWEST] * (dist.get_world_size() // self.sequence_parallel_size)
        inverse = list(groups)
        group = dist.get_rank() // self.sequence_parallel_size
        groups[group], inverse[group] = drawn, ~drawn
        # The largest of `~x` is `~` of the smallest: one maximum tells whether all are equal.
        both = torch.tensor([*mine, *groups, *(~x for x in mine), *inverse], device=args.device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        largest, smallest = both.view(2, -1)
        equal = (largest == ~smallest).tolist()
        if not all(equal):
            cause = _explain(args.device, tensors, sums, facts) or _explain_random(drawn, self.sequence_parallel_size)
            raise RuntimeError(
                f"ranks that must hold the same numbers differ after step {state.global_step}: {cause}. Every rank "
                "would train its own model from here: resume from a checkpoint before the difference, and look for "
                "code that runs on one rank only, checkpoints that differ between nodes, or a faulty device."
            )


def attach_replica_guard(trainer: Trainer, every: int, sequence_parallel_size: int) -> None:
    """Add a guard to `trainer`, unless `every` is 0, it has one, or DeepSpeed keeps the numbers in its own way."""
    callbacks = trainer.callback_handler.callbacks
    if every and not trainer.is_deepspeed_enabled and not any(isinstance(c, ReplicaGuard) for c in callbacks):
        trainer.add_callback(ReplicaGuard(every=every, sequence_parallel_size=sequence_parallel_size))


def replicated(model: torch.nn.Module, optimizer) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """What ranks must agree on: tensors by name, parameters first, and plain values by name."""
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, object] = {}
    names: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters():
        names[parameter] = name.replace("_checkpoint_wrapped_module.", "")
        tensors[f"parameter `{names[parameter]}`"] = parameter
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        for key, value in group.items():
            if key != "params":
                _sort_value(f"`{key}` of the optimizer's group {index}", value, tensors, facts)
        for parameter in group["params"]:
            name = names.get(parameter, f"parameter of group {index}")
            for key, value in optimizer.state.get(parameter, {}).items():
                _sort_value(f"optimizer state `{key}` of `{name}`", value, tensors, facts)
    tensors = {name: _whole(tensor) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, facts


def _sort_value(name: str, value: object, tensors: dict, facts: dict) -> None:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
    elif isinstance(value, int | float | str | None):
        facts[name] = value


def _whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """The numbers that every rank holds, or `None` for a tensor of which this rank holds a part."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    return tensor.to_local().detach() if all(place.is_replicate() for place in tensor.placements) else None


def checksums(tensors: list[torch.Tensor], device: torch.device) -> list[int]:
    """The bits of each tensor as 64-bit words, added up modulo 2^64: one changed entry always changes it.

    Two changes that cancel in the sum, such as two words swapped, go unseen.
    """
    sums = [part.to(device, non_blocking=True) for tensor in tensors for part in _sum_words(tensor)]
    if not sums:
        return []
    pairs = torch.stack(sums).view(-1, 2).sum(dim=1)
    return pairs.tolist()


def _sum_words(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    octets = tensor.contiguous().view(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    end = octets.numel() // 8 * 8
    rest = torch.nn.functional.pad(octets[end:], (0, end + 8 - octets.numel()))
    return octets[:end].view(torch.int64).sum(), rest.view(torch.int64)[0]


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether a step of this model draws random numbers, in a layer or, by its configuration, in attention."""
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    config: Any = getattr(model, "config", None)
    values = config.get_text_config().to_dict() if hasattr(config, "get_text_config") else {}
    rates = [value for key, value in values.items() if "drop" in key or key.endswith("pdrop")]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def random_state_hash(device: torch.device, everyones: bool = False) -> int:
    """torch's random state of the CPU and of `device` as one integer; with `everyones` also Python's, numpy's."""
    states: list = [torch.get_rng_state().numpy().tobytes()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device).numpy().tobytes())
    if everyones:
        states += [random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]]
    return _hash(states)


def _hash(values: list) -> int:
    """A 63-bit checksum of plain values; the same on every rank and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big") >> 1


def _explain(device: torch.device, tensors: dict, sums: dict[str, int], facts: dict[str, object]) -> str | None:
    """The first difference in words, the same on every rank; `None` if all agree."""
    shapes = {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()
    }
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (facts, shapes, sums))
    for kind in range(2):
        for name in dict.fromkeys(name for rank in everywhere for name in rank[kind]):
            values = [rank[kind].get(name, "nothing") for rank in everywhere]
            if len(set(values)) > 1:
                return f"{name} is {_per_rank(values)}"
    for name in tensors:
        values = [rank[2][name] for rank in everywhere]
        if len(set(values)) > 1:
            return _explain_tensor(device, name, tensors[name], values)
    return None


def _explain_tensor(device: torch.device, name: str, tensor: torch.Tensor, sums: list[int]) -> str:
    """Where `tensor` first differs. Communication: it is broadcast once, in pieces, and two gathers."""
    most = sums.index(Counter(sums).most_common(1)[0][0])
    flat, first = tensor.reshape(-1), None
    for start in range(0, flat.numel(), _CHUNK):
        mine = flat[start : start + _CHUNK].to(device).contiguous().view(torch.uint8)
        other = mine.clone()
        dist.broadcast(other, most)
        wrong = (mine != other).nonzero()
        if first is None and len(wrong):
            first = start + int(wrong[0]) // tensor.element_size()
    places: list = [None] * len(sums)
    dist.all_gather_object(places, first)
    index = min(place for place in places if place is not None)
    values: list = [None] * len(sums)
    dist.all_gather_object(values, flat[index].item())
    at = [int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape)]
    culprits = ", ".join(str(rank) for rank, value in enumerate(sums) if value != sums[most])
    return f"{name} on rank {culprits}, first at {at}: {_per_rank(values)}"


def _explain_random(state_hash: int, sequence_parallel_size: int) -> str:
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, state_hash)
    for group in _split(everywhere, sequence_parallel_size):
        if len({value for _, value in group}) > 1:
            common = Counter(value for _, value in group).most_common(1)[0][0]
            culprits = ", ".join(str(rank) for rank, value in group if value != common)
            return (
                f"torch's random state on rank {culprits} is not that of rank "
                f"{next(rank for rank, value in group if value == common)}, with which it shares rows and dropout "
                "(checksums " + _per_rank([value for _, value in group], group[0][0]) + ")"
            )
    raise AssertionError("checksums differed, but nothing they are made of")


def _split(values: list, size: int) -> Iterator[list[tuple[int, object]]]:
    numbered = list(enumerate(values))
    return (numbered[start : start + size] for start in range(0, len(numbered), size))


def _per_rank(values: list, first_rank: int = 0) -> str:
    """`1.0 on rank 0, 2.0 on ranks 1, 2`."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values, first_rank):
        ranks.setdefault(repr(value), []).append(str(rank))
    return ", ".join(f"{value} on rank{'s'[: len(who) > 1]} {', '.join(who)}" for value, who in ranks.items())

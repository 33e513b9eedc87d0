"""Prove on tiny rows that the loss of a trainer is a sum over tokens: whole rows = sum over shares.

An overridden `compute_loss` and a `compute_loss_func` can be anything. So the trainer's own path from a batch to its
loss (`_prepare_inputs`, `_get_num_items_in_batch`, `compute_loss`) runs twice: on whole rows as the only process, and
on this rank's share. The rows have different numbers of valid tokens, and ignored labels at the borders of shares.
What the model returns for a token is the same in both runs, so what is left is the loss. Compared are its value, and
its gradient by everything that the model returned: a weight by position, a mean or a square over a row, a maximum and
a term between neighbours differ there.
Price: two forwards of `3 (4 P - 1)` tokens; six for an overridden `compute_loss`, which may know training from
evaluation and the first step from a late one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.wrapped import unwrap
from ..losses.token_mean import token_mean
from ..parallel.collectives import gather_integers, gather_sequence
from ..parallel.shard import IGNORE_INDEX, cut_batch
from ..tiny_check import REORDERED_SUMS, SAME_SUMS, random_tokens
from .captured_outputs import CapturedOutputs
from .shifting_loss import ShiftingLoss
from .trial import is_overridden, on_trial, one_process
from .true_cause import validate_labels


_PATH = ("compute_loss", "_prepare_inputs", "_get_num_items_in_batch", "compute_loss_context_manager")
_LATE_STEP = 10**6


def prove_loss(trainer: Any, inputs: Mapping[str, Any]) -> None:
    """Raise unless the loss of `trainer` on shares of tiny rows adds up to that of whole ones.

    Args:
        trainer: whose batches are cut; every rank calls this.
        inputs (`Mapping`): its first share. What it holds for each token beside the usual keys, the tiny rows hold
            too.

    Raises:
        NotImplementedError: it does not, or that cannot be seen.

    Communication: that of a few forwards, and of the gradient by their outputs.
    """
    overridden, sharded = is_overridden(trainer, *_PATH), trainer.mesh.sequence_parallel_size > 1
    own_function = isinstance(trainer.compute_loss_func, ShiftingLoss) or trainer.label_smoother is not None
    if not overridden and not (sharded and own_function):
        return validate_labels(trainer, inputs)
    rows = tiny_rows(trainer, inputs)
    if not sharded:
        return _refuse_late_labels(trainer, rows)
    for training, step in [(True, 0), (True, _LATE_STEP), (False, 0)] if overridden else [(True, 0)]:
        _compare(trainer, rows, overridden, training, step)


def _compare(trainer: Any, rows: dict[str, torch.Tensor], overridden: bool, training: bool, step: int) -> None:
    share, name = cut(trainer, rows), _name(trainer, overridden) + ("" if training else " in evaluation")
    whole = _whole(trainer, rows, name, training, step)
    changes: dict[str, Any] = {"state": _state(trainer, step)}
    if isinstance(trainer.compute_loss_func, ShiftingLoss):
        # A copy, so that the first real batch is still proven to be divided by its count.
        changes["compute_loss_func"] = copy.copy(trainer.compute_loss_func)
    shape, local_len = rows["input_ids"].shape, share["input_ids"].shape[1]
    outputs = CapturedOutputs(trainer.model, whole.outputs, shape, local_len, trainer.mesh.sequence_parallel_rank)
    part, error = None, None
    try:
        with on_trial(trainer, training, **changes):
            part = _run(trainer, share, share, outputs)
    except Exception as failure:
        error = failure
    if any(gather_integers(int(error is not None), trainer.mesh.sp_group)) or part is None:
        raise error or _unproven(name, "failed on another rank")
    _validate_calls(trainer, name, whole, part)
    _validate_sum(trainer, name, whole, part, overridden)


def _whole(trainer: Any, rows: dict[str, torch.Tensor], name: str, training: bool, step: int) -> _Run:
    """The loss of whole rows in one process: with labels as the user's collator gives them, or with targets too."""
    alone, aligned = one_process(trainer), cut(trainer, rows, alone=True)
    error: Exception | None = None
    for batch in [aligned] if trainer.compute_loss_func is token_mean else [rows, aligned]:
        try:
            with on_trial(trainer, training, state=_state(trainer, step), **alone):
                return _run(trainer, batch, aligned, CapturedOutputs(trainer.model))
        except Exception as failure:
            error = error or failure
    reason = " ".join(str(error).split())[:200]
    raise _unproven(name, f"failed on whole tiny rows ({type(error).__name__}: {reason})") from error


@dataclass(frozen=True)
class _Run:
    value: torch.Tensor
    gradients: list[tuple[bool, torch.Tensor | None]]
    outputs: CapturedOutputs
    count: float | None
    readers: frozenset[int]
    changes_labels: bool


def _run(trainer: Any, batch: dict[str, Any], counted: dict[str, Any], outputs: CapturedOutputs) -> _Run:
    """The loss of one batch, as `training_step` gets it, and what the model returned for it."""
    device = trainer.args.device
    count = trainer._get_num_items_in_batch([dict(counted)], device)
    inputs = trainer._prepare_inputs(dict(batch))
    shard, labels = inputs.get("sequence_shard"), inputs["labels"].clone()
    with torch.enable_grad(), outputs, trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
    gradients = outputs.gradients(loss)
    value = torch.as_tensor(loss).detach().double().sum().reshape(1, 1).to(device)
    readers = frozenset() if shard is None else frozenset(shard.readers)
    changes = "labels" in inputs and not torch.equal(inputs["labels"], labels)
    return _Run(value, gradients, outputs, None if count is None else float(count), readers, changes)


def _refuse_late_labels(trainer: Any, rows: dict[str, torch.Tensor]) -> None:
    """On one process any loss is exact, unless it changes labels after targets were made of them."""
    if trainer._takes_shifted_labels:
        return
    aligned, runs = cut(trainer, rows), []
    for batch, changes in ((rows, {"shards_batches": False}), (aligned, {})):
        try:
            with on_trial(trainer, state=_state(trainer, 0), **changes):
                runs.append(_run(trainer, batch, aligned, CapturedOutputs(trainer.model)))
        except Exception:
            return  # it may need more than tiny rows have
    expected, value = (float(run.value) for run in runs)
    if runs[1].changes_labels and abs(expected - value) > REORDERED_SUMS.half * abs(expected):
        raise _late_labels(_name(trainer, True), value, expected)


def _late_labels(name: str, value: float, expected: float) -> NotImplementedError:
    return NotImplementedError(
        f"{name} gives {value:.6g} for a batch that brings its targets as `shift_labels`, and {expected:.6g} for its "
        "`labels` alone: change `labels` in the collator, before they become targets, or read `shift_labels`."
    )


def _unproven(name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} {reason}, so it cannot be proven to be a sum over tokens: pass the loss as `compute_loss_func`, or "
        "set `sequence_parallel_size` to 1."
    )


def _validate_calls(trainer: Any, name: str, whole: _Run, part: _Run) -> None:
    """Raise unless the model ran alike on whole rows and on shares, and is what the loss depends on."""
    group, half = trainer.mesh.sp_group, _is_half(trainer)
    allowed = 5 * REORDERED_SUMS.half if half else REORDERED_SUMS.of(next(trainer.model.parameters()).dtype)
    alike = whole.outputs.layout() == part.outputs.layout()
    reads = trainer.proven_readers <= part.readers
    if not any(gradient is not None for _, gradient in whole.gradients):
        raise _unproven(name, "depends on nothing that `model(...)` returned to it")
    if not all(gather_integers(int(alike), group)):
        raise _unproven(name, "does not call the model alike on whole rows and on shares")
    if not all(gather_integers(int(reads and part.outputs.error <= allowed), group)):
        raise NotImplementedError(
            f"{name} does not give the model all of `inputs` (`sequence_shard` and `position_ids` belong to them), so "
            "it sees other tokens than one process does: call `model(**inputs)`."
        )


def _validate_sum(trainer: Any, name: str, whole: _Run, part: _Run, overridden: bool) -> None:
    """Raise unless the mean over ranks is the value of whole rows, and has its gradient."""
    size, world, group = trainer.mesh.sequence_parallel_size, trainer.mesh.world_size, trainer.mesh.sp_group
    expected, mean = float(whole.value), float(gather_sequence(part.value, group).mean())
    half = _is_half(trainer)
    allowed = REORDERED_SUMS.half if half else REORDERED_SUMS.of(next(trainer.model.parameters()).dtype)
    exact = SAME_SUMS.half if half and overridden else SAME_SUMS.float32
    allowed *= max(abs(expected), abs(mean), 1e-12)
    worst = max(_gradient_errors(whole, part, size, group), default=0.0)
    if abs(expected - mean) <= allowed and worst <= exact:
        return
    if overridden and abs(expected - world * mean) <= allowed * world:
        raise NotImplementedError(
            f"{name} divides by the tokens of all {world} processes, and the mean over processes divides by {world} "
            f"again ({mean:.6g} for {expected:.6g} in one process): multiply by `self.accelerator.num_processes`, or "
            "pass the loss as `compute_loss_func`."
        )
    if any(gather_integers(int(part.changes_labels), group)):
        raise _late_labels(name, mean, expected)
    reason = f"is {expected:.6g} for tiny rows in one process and {mean:.6g} over {size} shares of them"
    if abs(expected - mean) <= allowed:
        reason = f"has another gradient over {size} shares of tiny rows (off by {worst:.1e} of its largest entry)"
    if overridden:
        raise NotImplementedError(
            f"{name} {reason}: a share's last target is on the next rank, and its means are local; pass the loss as "
            "`compute_loss_func`, which gets aligned targets, or add up terms of `super().compute_loss(...)` only."
        )
    raise NotImplementedError(
        f"{name} {reason}, so it is no sum over tokens: a weight by position, a mean or a square over a row, a "
        "maximum or a term between neighbours sees a share only; sum over tokens, or set `sequence_parallel_size` "
        "to 1."
    )


def _is_half(trainer: Any) -> bool:
    dtype = next(trainer.model.parameters()).dtype
    return trainer.args.bf16 or trainer.args.fp16 or dtype not in (torch.float64, torch.float32)


def _gradient_errors(whole: _Run, part: _Run, size: int, group) -> Iterator[float]:
    """How far the gradient by each output is from that of whole rows, relative to its largest entry."""
    outputs = part.outputs
    for (_, theirs), (of_tokens, ours), (like, mine) in zip(whole.gradients, part.gradients, outputs.leaves()):
        if theirs is None and not any(gather_integers(int(ours is not None), group)):
            continue
        theirs = torch.zeros_like(like) if theirs is None else theirs
        ours = torch.zeros_like(mine) if ours is None else ours
        if of_tokens:
            known = theirs.shape[1] if theirs.dim() > 1 and len(theirs) == outputs.shape[0] else None
            theirs = outputs.as_tokens(theirs)[:, :known]  # what a head leaves out is constant
            ours = gather_sequence(outputs.as_share(ours), group)[:, : theirs.shape[1]] / size
        elif _is_of_whole_rows(like, mine, group):
            ours = gather_sequence(ours.reshape(1, -1), group).mean(dim=1, keepdim=True)
            theirs = theirs.reshape(1, -1)
        else:  # a loss that the model divides by the count that it is given
            counts = part.count / whole.count if whole.count and part.count else 1.0
            ours = gather_sequence(ours.reshape(1, -1), group) / (size * counts)
            if ours.numel() != size * theirs.numel():
                yield float("inf")
                continue
            theirs = theirs.reshape(1, -1).repeat(1, size)
        largest = torch.stack([theirs.abs().max(), ours.abs().max()]).max().clamp(min=1e-30)
        yield float((ours - theirs).abs().max() / largest)


def _is_of_whole_rows(whole: torch.Tensor, mine: torch.Tensor, group) -> bool:
    """Whether every rank has the number of whole rows, as for the loss of routers; gradients of all then add up."""
    same = whole.dim() == 0 == mine.dim() and torch.allclose(mine, whole, rtol=REORDERED_SUMS.float32)
    return all(gather_integers(int(same), group))


def tiny_rows(trainer: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Three whole rows with labels that have nothing to do with the tokens, and whatever else a batch of this run has.

    Row 0 trains every token, row 1 its end only, row 2 all but the borders of shares and its end.
    """
    mesh, group = trainer.mesh, trainer.mesh.sp_group
    size, device = mesh.sequence_parallel_size, trainer.args.device
    num_tokens = max(4 * size - 1, 7)
    vocabulary = unwrap(trainer.model).config.get_text_config().vocab_size
    ids, labels = random_tokens(vocabulary, 2, 3, num_tokens).to(device)
    local = -(-num_tokens // size)
    labels[1, : num_tokens - num_tokens // 3] = IGNORE_INDEX
    labels[2, num_tokens - local :] = IGNORE_INDEX  # or shares could have equally many by chance
    for border in range(local, num_tokens, local):
        labels[2, border - 1 : border + 1] = IGNORE_INDEX
    positions = torch.arange(num_tokens, device=device).expand(3, -1).contiguous()
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions, "labels": labels}
    shape = inputs["input_ids"].shape if "input_ids" in inputs else ()
    usual = {*rows, "shift_labels", "inputs_embeds"}
    for key, value in inputs.items():
        if key in usual or not isinstance(value, torch.Tensor):
            continue
        if value.dim() >= 2 and value.shape[:2] == shape:
            some = gather_sequence(value[:, :local], group)
            index = [torch.arange(count, device=device) % length for count, length in zip((3, num_tokens), some.shape)]
            rows[key] = some[index[0][:, None], index[1]]
    return rows


def cut(trainer: Any, rows: Mapping[str, torch.Tensor], alone: bool = False) -> dict[str, Any]:
    """This rank's share of tiny rows, as a data worker cuts it; or all of them, with their targets."""
    mesh, inner_attention = trainer.mesh, trainer.long_context.inner_attention
    size, rank = (1, 0) if alone else (mesh.sequence_parallel_size, mesh.sequence_parallel_rank)
    return cut_batch(rows, size, rank, inner_attention=inner_attention, shift_labels=trainer.shifts_labels)


def _state(trainer: Any, step: int):
    """The trainer's state at that step of a long run."""
    state = copy.copy(trainer.state)
    state.global_step, state.max_steps = step, max(state.max_steps or 0, 2 * _LATE_STEP)
    state.epoch = float(bool(step))
    return state


def _name(trainer: Any, overridden: bool) -> str:
    if overridden:
        return f"`compute_loss` of `{type(trainer).__name__}`"
    return "`compute_loss_func`" if trainer.compute_loss_func is not None else "`label_smoother`"

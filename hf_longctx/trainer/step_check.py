"""Prove that an overridden `training_step` or `prediction_step` takes its loss from `compute_loss`, on whole inputs.

The step runs once on tiny rows with a `compute_loss` that gives known numbers, and with a backward that keeps what it
gets. So no model runs, unless the step runs it by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..parallel.collectives import gather_integers
from .loss_check import cut, tiny_rows
from .trial import is_overridden, on_trial


_LATE_LABELS = "it changes `labels`, which were made targets (`shift_labels`) before the row was cut"


class _Recorder:
    """An accelerator that keeps the losses of `backward`, and a `compute_loss` that returns known ones."""

    sync_gradients = False

    def __init__(self, accelerator: Any, value: float) -> None:
        self._accelerator, self.value = accelerator, value
        self.inputs: list[dict[str, Any]] = []
        self.leaves: list[torch.Tensor] = []
        self.backward_losses: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        self.backward_losses.append(loss)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        self.inputs.append(inputs)
        with torch.enable_grad():
            leaf = torch.tensor(self.value, device=inputs["input_ids"].device, requires_grad=True)
            self.leaves.append(leaf)
            loss = leaf.clone() if torch.is_grad_enabled() else leaf.detach().clone()
        return (loss, {"loss": loss}) if return_outputs else loss

    def slopes(self) -> list[float]:
        """The gradient of what went backward, by each loss."""
        total = sum(loss.sum() for loss in self.backward_losses if loss.requires_grad)
        if not self.leaves or not isinstance(total, torch.Tensor):
            return []
        found = torch.autograd.grad(total, self.leaves, allow_unused=True)
        return [0.0 if slope is None else float(slope) for slope in found]


def prove_training_step(trainer: Any, inputs: Mapping[str, Any]) -> None:
    """Raise unless what goes backward is linear in what `compute_loss` gives, and nothing else.

    Args:
        trainer: whose batches are cut; every rank calls this.
        inputs (`Mapping`): its first share.

    Raises:
        NotImplementedError: it is not.
    """
    if not is_overridden(trainer, "training_step"):
        return
    share = cut(trainer, tiny_rows(trainer, inputs))
    slopes: list[list[float]] = []
    problem: str | None = None
    for value in (1.0, 3.0):
        recorder = _Recorder(trainer.accelerator, value)
        problem = problem or _run_step(trainer, recorder, share)
        slopes.append(recorder.slopes())
    if problem is None and (slopes[0] != slopes[1] or not any(slopes[0])):
        problem = "what goes backward is not what `compute_loss` gives, or a multiple of it"
    if trainer.mesh.sequence_parallel_size == 1 and problem != _LATE_LABELS:
        return  # one process may do with its rows what it likes
    _agree(trainer, "training_step", problem)


def _run_step(trainer: Any, recorder: _Recorder, share: dict[str, Any]) -> str | None:
    """Run the overridden `training_step`; what is wrong with it, if anything is."""
    parameters = list(trainer.model.parameters())
    calls: list[int] = []
    gradients = [parameter.grad for parameter in parameters]
    hook = trainer.model.register_forward_hook(lambda *_: calls.append(1))
    config = dataclasses.replace(trainer.long_context, on_nonfinite="off")
    changes = {"accelerator": recorder, "compute_loss": recorder.compute_loss, "long_context": config}
    try:
        with on_trial(trainer, **changes):
            trainer.training_step(trainer.model, dict(share), torch.tensor(10.0, device=trainer.args.device))
    except Exception as error:
        return f"it failed on tiny rows ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    finally:
        hook.remove()
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
    if calls:
        return "it runs the model by itself"
    return _problem_of_inputs(trainer, recorder, share)


def prove_prediction_step(trainer: Any, inputs: Mapping[str, Any]) -> None:
    """Raise unless an overridden `prediction_step` returns the loss that ours has counted.

    Args:
        trainer: whose batches are cut; every rank calls this.
        inputs (`Mapping`): its first share.

    Raises:
        NotImplementedError: it does not.
    """
    if not is_overridden(trainer, "prediction_step") or trainer.mesh.sequence_parallel_size == 1:
        return
    share, recorder, problem = cut(trainer, tiny_rows(trainer, inputs)), _Recorder(trainer.accelerator, 3.0), None
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
    changes = {"accelerator": recorder, "compute_loss": recorder.compute_loss, "_eval_sums": sums}
    try:
        with on_trial(trainer, training=False, **changes):
            returned = trainer.prediction_step(trainer.model, dict(share), True)
        problem = _problem_of_inputs(trainer, recorder, share)
        loss = returned[0] if isinstance(returned, tuple) and returned else None
        if problem is None and (loss is None or float(loss) != 3.0 or not sums.any()):
            problem = "its loss is not the one that the trainer's own has counted, of which `eval_loss` is the mean"
    except Exception as error:
        problem = f"it failed on tiny rows ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    _agree(trainer, "prediction_step", problem)


def _problem_of_inputs(trainer: Any, recorder: _Recorder, share: dict[str, Any]) -> str | None:
    """What is wrong with the inputs that reached `compute_loss`."""
    if not recorder.inputs:
        return "it computes its loss without `compute_loss`"
    for inputs in recorder.inputs:
        shard = inputs.get("sequence_shard")
        if shard is None or (shard.size > 1 and shard.group is None):
            return "`compute_loss` gets a batch without its `sequence_shard`, or one that is not bound"
        if "shift_labels" in share and _differ(inputs, share, "labels") and not _differ(inputs, share, "shift_labels"):
            if not trainer._takes_shifted_labels:
                return _LATE_LABELS
    return None


def _differ(inputs: Mapping[str, Any], share: Mapping[str, Any], name: str) -> bool:
    seen = inputs.get(name)
    return seen is None or not torch.equal(seen, share[name].to(seen.device))


def _agree(trainer: Any, method: str, problem: str | None) -> None:
    """One decision of all ranks of a group."""
    if any(gather_integers(int(problem is not None), trainer.mesh.sp_group)):
        raise NotImplementedError(
            f"`{method}` of `{type(trainer).__name__}` cannot be proven on shares: "
            f"{problem or 'it fails on another rank'}; call `super().{method}(...)` or `self.compute_loss(...)`, and "
            "put the loss into `compute_loss_func`."
        )

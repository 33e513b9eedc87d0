"""A step whose loss or gradient is not finite: found before the optimizer step, and reported by layer, rank and row.

One such step ruins all weights, and transformers' log shows an average instead of the loss. Whether a step is taken is
therefore decided once for all ranks, by the loss and by the norm of the gradient before it is clipped.
Price: one pass over the gradients a step and one all-reduce of three integers; if it strikes, the step's forward and
backward once more, to find out where.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..adapters.wrapped import unwrap


_TRL_COUNTERS = ("_metrics", "_total_train_tokens")  # filled by its loss, and not to be filled twice
_SHOWN_TOKENS = 8
_UNSEEN = "backward"


def has_finite_step(model: torch.nn.Module, losses: list[torch.Tensor]) -> torch.Tensor:
    """Whether this rank's losses, its (parts of) summed gradients and their norm are finite; no synchronization."""
    gradients = [_local(gradient) for _, gradient in _gradients(model)]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    device = losses[0].device
    return torch.stack([torch.isfinite(value).to(device) for value in (*losses, norm)]).all()


def forget_gradients(model: torch.nn.Module) -> None:
    """Without gradients an optimizer leaves weights and moments as they are."""
    for parameter in model.parameters():
        parameter.grad = None


def explain_step(trainer, model: torch.nn.Module, batches: list[dict], losses: list[torch.Tensor], count) -> dict:
    """Run the step's micro-batches again and say where its numbers stop being finite.

    Args:
        trainer: the running trainer; its random state and its counters are put back afterwards.
        model (`torch.nn.Module`): as wrapped for training. Its gradients are gone afterwards.
        batches (`list[dict]`): micro-batches as the loader gave them.
        losses (`list[torch.Tensor]`): what they returned.
        count: `num_items_in_batch` of the step.

    Returns:
        `dict`: `message`, equal on all ranks, and `ruined`, the name of a weight that is itself not finite, if any.

    Communication: that of the forwards and backwards, and a gather of a short message; every rank must call it.
    """
    found: dict[str, Any] = {
        "losses": [float(loss) for loss in losses],
        "gradient": _first_bad(_gradients(model)),
        "largest": _largest(_gradients(model)),
        "weight": _first_bad(model.named_parameters()),
        "place": None,
        "unseen": False,
    }
    forget_gradients(model)
    kept = {name: copy.deepcopy(getattr(trainer, name)) for name in _TRL_COUNTERS if hasattr(trainer, name)}
    devices = [trainer.args.device] if trainer.args.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        for index, batch in enumerate(batches):
            place = _run_again(trainer, model, batch, count)
            found["unseen"] |= place == _UNSEEN
            if found["place"] is None and place not in (None, _UNSEEN):
                found["place"] = f"micro-batch {index}, {place}"
    for name, value in kept.items():
        setattr(trainer, name, value)
    everywhere: list[Any] = [found]
    if trainer.args.world_size > 1:
        everywhere = [None] * trainer.args.world_size
        dist.all_gather_object(everywhere, found)
    weight = next((rank["weight"] for rank in everywhere if rank["weight"]), None)
    return {"message": _message(everywhere), "ruined": weight}


def _message(everywhere: list[dict]) -> str:
    parts = []
    for rank, found in enumerate(everywhere):
        bad = [f"{loss} in micro-batch {i}" for i, loss in enumerate(found["losses"]) if loss - loss != 0]
        if bad:
            parts.append(f"the loss of rank {rank} is {', '.join(bad)}")
    gradient = next((found["gradient"] for found in everywhere if found["gradient"]), None)
    if gradient is not None:
        parts.append(f"the gradient of `{gradient}` is the first that is not finite")
    elif not parts:
        # Clipping to a norm of `inf` makes every gradient 0, and without it the square in Adam's second moment is
        # `inf` for good: either way a step is counted in which nothing is learned.
        size, name = max(found["largest"] for found in everywhere)
        return f"every gradient is finite, but their norm overflows; the largest is {size:.3g}, in that of `{name}`"
    for rank, found in enumerate(everywhere):
        if found["weight"]:
            parts.append(f"the weight `{found['weight']}` itself is not finite on rank {rank}")
            break
    places = [f"on rank {rank}: {found['place']}" for rank, found in enumerate(everywhere) if found["place"]]
    if places:
        parts.append("it begins " + "; ".join(places))
    elif any(found["unseen"] for found in everywhere):
        parts.append("every forward is finite, and FSDP or re-entrant checkpointing hides its backward")
    else:
        parts.append("not reproduced by running the same batches again (intermittent)")
    return "; ".join(parts)


def _gradients(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()


def _first_bad(tensors: Iterator[tuple[str, torch.Tensor]]) -> str | None:
    return next((name.removeprefix("module.") for name, tensor in tensors if not _is_finite(_local(tensor))), None)


def _largest(tensors: Iterator[tuple[str, torch.Tensor]]) -> tuple[float, str]:
    """The largest magnitude, and in which tensor it is."""
    sizes = ((float(_local(t).abs().max()), name.removeprefix("module.")) for name, t in tensors if _local(t).numel())
    return max(sizes, default=(0.0, ""))


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())  # detached: checkpointing counts what a forward saves


def _run_again(trainer, model: torch.nn.Module, batch: dict, count) -> str | None:
    """Forward and backward of one micro-batch with every module watched; the first place that is not finite."""
    inputs = trainer._prepare_inputs(dict(batch) if isinstance(batch, Mapping) else batch)
    model = trainer.accelerator.unwrap_model(model)
    watch = _Watch(inputs)
    hooks = [m.register_forward_hook(watch.see(name), with_kwargs=True) for name, m in model.named_modules() if name]
    try:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=count)
        # What a model knows of steps that it took itself comes before the layers that ran on their results.
        watch.place = getattr(unwrap(model), "explain_nonfinite", lambda: None)() or watch.place
        if watch.place is None and not _is_finite(loss):
            trains_nothing = count is not None and float(count) == 0
            why = "every label of the step is -100" if trains_nothing else "every layer's output is finite"
            watch.place = f"in the loss itself ({float(loss.detach())}): {why}"
        if watch.place is None and loss.requires_grad:
            if trainer.is_fsdp_enabled or _is_reentrant(model):
                return _UNSEEN
            learning = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(loss, learning, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return watch.place


def _is_reentrant(model: torch.nn.Module) -> bool:
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    return any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions if function)


class _Watch:
    """Remembers the first tensor that is not finite: outputs in the order of the forward, then gradients."""

    def __init__(self, inputs: dict) -> None:
        self.place: str | None = None
        self._ids, self._shard = inputs.get("input_ids"), inputs.get("sequence_shard")
        self._differentiates = True

    def see(self, name: str):
        def hook(module, args, kwargs, output):
            if self.place is not None:
                return
            for tensor in _tensors(output):
                if _is_finite(tensor):
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: self._see_gradient(name, gradient))
                    continue
                entered = not all(_is_finite(given) for given in _tensors((args, kwargs)))
                how = "enters" if entered else "comes out of"
                self.place = f"forward, what {how} `{name}`{self._where(tensor)}"
                return

        return hook

    def _see_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self.place is None and not _is_finite(gradient):
            self.place = f"backward, the gradient of what comes out of `{name}`{self._where(gradient)}"

    def _where(self, tensor: torch.Tensor) -> str:
        """Rows and the first token, where the tensor has one entry for each."""
        ids = self._ids
        if ids is None or tensor.dim() < 2 or tensor.shape[:2] != ids.shape:
            return ""
        bad = ~torch.isfinite(tensor.detach().reshape(*ids.shape, -1)).all(-1)
        rows = bad.any(1).nonzero().flatten().tolist()
        first = int(bad[rows[0]].nonzero()[0])
        offset = first + (self._shard.rank * ids.shape[1] if self._shard is not None else 0)
        shown = ids[rows[0], first : first + _SHOWN_TOKENS].tolist()
        words = f"row {rows[0]}" if len(rows) == 1 else f"rows {', '.join(map(str, rows))}"
        return f" in {words} of the batch, from token {offset} on (`input_ids` {shown})"


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Floating-point tensors anywhere in nested lists and mappings."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)

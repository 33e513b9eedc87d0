"""Loss, outputs and every gradient: of one process on whole rows, and of the ranks that share them.

One process runs transformers' own attention on its own rows, packed documents one by one. It knows nothing of shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters.rotary_lengths import forget_lengths
from ..adapters.router_losses import asks_for_router_loss
from ..parallel.collectives import gather_sequence
from ..parallel.mesh import SequenceMesh
from ..parallel.shard import shard_batch
from ..tiny_check import vectors_of
from .model_under_test import Setting
from .random_rows import Rows
from .result import Errors
from .router_rows import rows_with_router_loss


# A key's bias cannot change a softmax: its gradient is a sum that cancels, and what rounding leaves of it is as large
# as that of the key's weight. So a gradient is held to the largest of its module, and a module to this of all.
_NEGLIGIBLE = 1e-3


@dataclass
class Numbers:
    """What a model made of its rows.

    Args:
        outputs (`torch.Tensor` of shape `(rows, T, D)`): logits, or an encoder's vectors.
        loss (`torch.Tensor`): of all rows.
        evaluation (`torch.Tensor`): the same in evaluation mode.
        gradients (`dict[str, torch.Tensor]`): of all parameters that have one.
        scale (`float`): what a difference of the loss is relative to.
    """

    outputs: torch.Tensor
    loss: torch.Tensor
    evaluation: torch.Tensor
    gradients: dict[str, torch.Tensor]
    scale: float = 1.0

    @property
    def is_finite(self) -> bool:
        tensors = (self.outputs, self.loss, self.evaluation, *self.gradients.values())
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def of_one_process(model: torch.nn.Module, task: str, rows: Rows) -> Numbers:
    """The reference implementation: the model as transformers runs it, on one process."""
    model.zero_grad()
    forget_lengths(model)
    outputs, loss, scale = _whole_rows(model.train(), task, rows)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    forget_lengths(model)
    with torch.no_grad():
        evaluation = _whole_rows(model.eval(), task, rows)[1]
    model.train()
    outputs = outputs.detach().masked_fill(~rows.valid[..., None], 0)
    return Numbers(outputs, loss.detach(), evaluation, gradients, scale)


def _whole_rows(model: torch.nn.Module, task: str, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, float]:
    dropped = ("position_ids",) if rows.counts_itself else ()
    batch = {name: value for name, value in rows.batch.items() if name not in dropped}
    if task == "causal-lm" and asks_for_router_loss(model):
        outputs, total = rows_with_router_loss(model, batch, rows, _settings(model))
        return outputs, total / rows.num_items, _scale(task, outputs, rows, total)
    if rows.kind != "packed":
        outputs, total = _one_batch(model, task, batch, rows)
        return outputs, total / rows.num_items, _scale(task, outputs, rows, total)
    pieces, total = [], 0.0
    for row, start, stop in rows.documents:
        forget_lengths(model)  # every document is alone
        document = {name: value[row : row + 1, start:stop] for name, value in batch.items()}
        output, part = _one_batch(model, task, document, rows, (row, start))
        pieces.append(output[0])
        total = total + part
    outputs = torch.cat(pieces).view(*rows.batch["input_ids"].shape, -1)
    return outputs, total / rows.num_items, _scale(task, outputs, rows, total)


def _one_batch(
    model: torch.nn.Module, task: str, batch: dict[str, torch.Tensor], rows: Rows, corner: tuple[int, int] = (0, 0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and the sum of the losses of their tokens."""
    settings = _settings(model)
    if task == "encoder":
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs = vectors_of(model(**inputs, **settings))
        if outputs.shape[:2] != batch["input_ids"].shape:
            raise ValueError(f"it answers with {tuple(outputs.shape)}, not with one vector a token")
        row, start = corner
        weights = _upstream(rows, outputs)[row:, start:][: outputs.shape[0], : outputs.shape[1]]
        return outputs, (outputs * weights).sum()
    labels = batch["labels"][:, 1:] if rows.shifts else batch["labels"]
    count = int((labels != -100).sum())
    if not count:
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"}, **settings).logits
        return outputs, outputs.sum() * 0.0
    result = model(**batch, **settings)
    return result.logits, result.loss * count


def on_the_ranks(model: torch.nn.Module, task: str, rows: Rows, mesh: SequenceMesh, setting: Setting) -> Numbers:
    """The same numbers from ranks that share rows; `model` may be wrapped. Every rank calls this.

    Gradients are those after the wrapper's mean over all ranks, as an optimizer sees them; outputs are the rows of
    this rank's group.
    """
    share = _share_of(model, rows, mesh, setting)
    model.zero_grad()
    forget_lengths(model)
    outputs, loss = loss_of_share(model.train(), task, share, rows)
    loss.backward()
    gradients = mean_gradients(model, setting.wrapper)
    model.zero_grad()
    forget_lengths(model)
    with torch.no_grad():
        evaluation = loss_of_share(model.eval(), task, share, rows)[1]
    model.train()
    whole = gather_sequence(outputs, mesh.sp_group)[:, : rows.valid.shape[1]]
    first = mesh.data_parallel_rank * len(whole)
    whole = whole.masked_fill(~rows.valid[first : first + len(whole), :, None], 0)
    return Numbers(whole, mean_of_ranks(loss), mean_of_ranks(evaluation), gradients)


def outputs_without_communication(
    model: torch.nn.Module, task: str, rows: Rows, mesh: SequenceMesh, setting: Setting
) -> torch.Tensor:
    """Outputs of ranks that see their own tokens only: the error that the exchange prevents."""
    share = _share_of(model, rows, mesh, setting)
    dropped = ("sequence_shard", "labels", "shift_labels", "num_items_in_batch", "weights")
    forget_lengths(model)
    with torch.no_grad():
        outputs = vectors_of(
            model(**{name: value for name, value in share.items() if name not in dropped}, **_settings(model))
        )
    return gather_sequence(outputs, mesh.sp_group)[:, : rows.valid.shape[1]]


def compare(ours: Numbers, theirs: Numbers, first_row: int) -> Errors:
    """Relative differences of this rank's numbers; `first_row`: of its group among the rows of one process."""
    gradient, parameter = worst_gradient(ours.gradients, theirs.gradients)
    expected = theirs.outputs[first_row : first_row + len(ours.outputs)]
    return Errors(
        loss=float((ours.loss - theirs.loss).abs() / theirs.scale),
        logits=relative(ours.outputs, expected),
        gradient=gradient,
        parameter=parameter,
        evaluation=float((ours.evaluation - theirs.evaluation).abs() / theirs.scale),
    )


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def worst_gradient(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the module's largest entry; and whose it is."""
    ours, theirs = ({name: gradient for name, gradient in side.items() if gradient.numel()} for side in (ours, theirs))
    largest = max((float(gradient.abs().max()) for gradient in theirs.values()), default=0.0)
    of_module: dict[str, float] = {}
    for name, gradient in theirs.items():
        module = name.rpartition(".")[0]
        of_module[module] = max(of_module.get(module, 0.0), float(gradient.abs().max()))
    worst, where = 0.0, ""
    for name in sorted(ours.keys() | theirs.keys()):
        actual, expected = ours.get(name), theirs.get(name)
        difference: Any = (0 if actual is None else actual) - (0 if expected is None else expected)
        size = max(of_module.get(name.rpartition(".")[0], 0.0), _NEGLIGIBLE * largest, 1e-30)
        error = float(difference.abs().max()) / size
        if not error <= worst or not where:
            worst, where = error, name
        if error != error:  # not a number: nothing is worse
            break
    return worst, where


def _share_of(model: torch.nn.Module, rows: Rows, mesh: SequenceMesh, setting: Setting) -> dict[str, Any]:
    batch = rows.of_group(mesh.data_parallel_rank)
    share = shard_batch(batch, mesh, model, inner_attention=setting.inner_attention, shift_labels=rows.shifts)
    share["num_items_in_batch"] = rows.num_items / setting.world_size
    return share


def loss_of_share(
    model: torch.nn.Module, task: str, share: dict[str, Any], rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's outputs, and its scalar, whose mean over the ranks is the loss of one process."""
    settings, count = _settings(model), share["num_items_in_batch"]
    if task == "encoder":
        dropped = ("labels", "shift_labels", "num_items_in_batch")
        outputs = vectors_of(
            model(**{name: value for name, value in share.items() if name not in dropped}, **settings)
        )
        shard = share["sequence_shard"]
        group = share["input_ids"].shape[0] * (dist.get_rank() // shard.size if dist.is_initialized() else 0)
        weights = _upstream(rows, outputs)[group : group + len(outputs), shard.rank * shard.local_len :]
        weights = weights[:, : shard.num_local_tokens]
        return outputs, (outputs[:, : shard.num_local_tokens] * weights).sum() / count
    result = model(**share, **settings)
    return result.logits, result.loss


def _settings(model: torch.nn.Module) -> dict[str, object]:
    config = getattr(model, "module", model).config
    return {"use_cache": False} if hasattr(config.get_text_config(), "use_cache") else {}


def _upstream(rows: Rows, outputs: torch.Tensor) -> torch.Tensor:
    """A random gradient for every real token, `(rows, T, D)`."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(*rows.valid.shape, outputs.shape[-1], generator=generator, dtype=torch.float64)
    return weights.to(outputs.dtype) * rows.valid[..., None]


def _scale(task: str, outputs: torch.Tensor, rows: Rows, total: torch.Tensor) -> float:
    """A random sum may be near 0; its terms are not."""
    if task == "encoder":
        return float((outputs.detach() * _upstream(rows, outputs)).abs().sum()) / rows.num_items
    return max(float(total.detach().abs()) / rows.num_items, 1e-30)


def mean_of_ranks(local: torch.Tensor) -> torch.Tensor:
    """What a wrapper's mean makes of my scalar and theirs."""
    value = local.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def mean_gradients(model: torch.nn.Module, wrapper: str) -> dict[str, torch.Tensor]:
    """Gradients after the wrapper's mean over all ranks, as an optimizer sees them."""
    gradients = {}
    for name, parameter in getattr(model, "module", model).named_parameters():
        gradient = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        elif wrapper == "fsdp2" and gradient is None:
            continue
        elif wrapper == "none":  # what a wrapper would do; an expert that no token of mine chose counts as zero
            gradient = mean_of_ranks(torch.zeros_like(parameter) if gradient is None else gradient)
        if gradient is not None:
            gradients[name] = gradient.detach().clone()
    return gradients


def wrap(model: torch.nn.Module, wrapper: str) -> torch.nn.Module:
    """The model in the wrapper that averages its gradients."""
    if wrapper == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if wrapper == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        everyone = DeviceMesh.from_group(dist.group.WORLD, "cpu")
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers:  # and whatever is tied across the model stays with its root
            fully_shard(layer, mesh=everyone)
        fully_shard(model, mesh=everyone)
    return model

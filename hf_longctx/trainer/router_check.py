"""Prove on tiny rows that the loss of a model's routers, and its gradient, are those of whole rows.

The cross entropy would hide it, which may be thousands of times larger. So it is divided by a count so large that the
loss of the routers alone is left, as the model adds it, with its own coefficient; where a trainer has a head of its
own it is read from the outputs. The rows are padded, and cut unevenly.
Price: two forwards and backwards of `4 P - 1` tokens, of models that add such a loss.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed import DistError

from ..adapters.wrapped import unwrap
from ..parallel.collectives import gather_sequence
from ..parallel.mesh import SequenceMesh
from ..parallel.shard import IGNORE_INDEX, share_of_group
from ..tiny_check import REORDERED_SUMS
from .gradient_check import MORE_SUMS, difference, embeddings_of, precision_of


_MANY = 1e12  # tokens of a step, of whose cross entropy nothing is left
# In half precision a near tie may send a token to another expert: one of the few tokens of a tiny row.
_HALF = 5


def check_router_loss(
    model, mesh: SequenceMesh, inner_attention: str, batch: dict[str, torch.Tensor], shift_labels: bool, own_loss: bool
) -> None:
    """Refuse a model whose routers' loss on shares is not that of whole rows.

    Args:
        model: that adds such a loss; on its device and in evaluation mode. Every rank of the world calls this; of one
            whose weights are sharded, the loss alone is compared.
        mesh ([`SequenceMesh`]): the axes of the run.
        inner_attention (`str`): see [`LongContextConfig`].
        batch (`dict`): tiny full rows with `input_ids` and `attention_mask`.
        shift_labels (`bool`): the model predicts the next token.
        own_loss (`bool`): the run uses the model's own loss.

    Raises:
        NotImplementedError: it is not, or there is none in one process.

    Communication: that of a forward and backward.
    """
    size, name = mesh.sequence_parallel_size, type(unwrap(model)).__name__
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    full: dict[str, Any] = {**batch, "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids)}
    if own_loss:
        full["labels"] = ids.masked_fill(~valid, IGNORE_INDEX)
    share = share_of_group(full, mesh, inner_attention=inner_attention, shift_labels=shift_labels)
    shard = dataclasses.replace(share["sequence_shard"], batch_weight=1.0)  # every group has the same rows
    share = {**share, "sequence_shard": shard, "output_router_logits": True}
    full["output_router_logits"] = True
    if own_loss:
        full["num_items_in_batch"], share["num_items_in_batch"] = _MANY, _MANY / size
    try:
        expected, theirs = _loss_and_gradient(model, full, own_loss)
    except DistError:
        raise
    except Exception as failure:
        raise NotImplementedError(
            f"`{name}` cannot compute the loss of its routers in one process either ({type(failure).__name__}: "
            f"{failure}): set `model.config.output_router_logits = False`, or install a later transformers."
        ) from failure
    actual, ours = _loss_and_gradient(model, share, own_loss)
    if expected is None or actual is None:
        return  # it returns the logits and computes no loss of them
    whole = gather_sequence(actual.reshape(1, 1), mesh.sp_group).mean()
    dtype = precision_of(model, expected)
    allowed = REORDERED_SUMS.of(dtype) * (1 if dtype in (torch.float64, torch.float32) else _HALF)
    errors = {"loss": (difference(whole, expected), allowed)}
    if theirs is not None and ours is not None:
        gathered = gather_sequence(ours, mesh.sp_group)[:, : ids.shape[1]] / size
        errors["gradient"] = difference(gathered, theirs), MORE_SUMS * allowed
    for what, (error, most) in errors.items():
        if not error <= most:
            raise NotImplementedError(
                f"`{name}` has another {what} of its routers when its rows are sharded (largest relative difference "
                f"{error:.1e}, allowed {most:.0e}), so it does not compute it of what its backbone returns as "
                "`router_logits`: set `model.config.output_router_logits = False`, or `sequence_parallel_size` to 1."
            )


def _loss_and_gradient(
    model, batch: dict[str, Any], own_loss: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the routers add to the loss, and its gradient with respect to the token embeddings."""
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    with embeddings_of(model) as found, torch.set_grad_enabled(not sharded):
        outputs = model(**batch)
        loss = outputs["loss"] if own_loss else outputs.get("aux_loss")
        if loss is None or not found or not loss.requires_grad:
            return None if loss is None else loss.detach(), None
        gradients = torch.autograd.grad(loss, found, allow_unused=True)
    used = [gradient for gradient in gradients if gradient is not None]
    return loss.detach(), sum(used[1:], used[0]) if used else None

"""Prove on a tiny random batch that a model's tiled loss is the model's own.

What a configuration says can be wrong, and what a model does between its head and its loss need not be in it. So the
loss and the gradient of the embeddings' output are computed both ways; that gradient passes the head and all layers.
Price: two forwards and two backwards of 2 x 9 tokens. No gradient of a parameter is kept or changed.
"""

from __future__ import annotations

import inspect

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..parallel.shard import IGNORE_INDEX
from ..tiny_check import REORDERED_SUMS, as_leaf, random_tokens, whole_model
from .instance_forward import patch_on
from .tiled_loss import TILED_LOSS, TiledLossHandle, find_causal_lm, tile_loss


def prove_tiled_loss(model: torch.nn.Module) -> None:
    """Raise unless the tiled loss of `model`, and its gradient, are those that the model computes itself.

    Args:
        model (`torch.nn.Module`): as for [`tile_loss`], patched by it or not, in its precision or under autocast;
            every rank calls this where its parameters are sharded.

    Raises:
        NotImplementedError: they differ, so the model does something between its head and its loss; or see
            [`tile_loss`].

    Communication: that of two forwards, and two backwards down to the embeddings.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # DDP would wait for the gradients of its parameters
    inner = find_causal_lm(model)
    patched = patch_on(inner, TILED_LOSS) is not None
    handle = TiledLossHandle(inner) if patched else tile_loss(inner)
    try:
        with whole_model(model):
            with handle.paused():
                expected = _loss_and_gradient(model, inner)
            actual = _loss_and_gradient(model, inner)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise NotImplementedError(
            f"the loss of `{type(inner).__name__}` cannot be tiled: {reason}; train it without a tiled loss."
        ) from error
    finally:
        if not patched:
            handle.remove()
    gradient = expected["gradient of the embeddings"]
    half = torch.is_autocast_enabled(gradient.device.type)
    allowed = REORDERED_SUMS.half if half else REORDERED_SUMS.of(gradient.dtype)
    for name, theirs in expected.items():
        difference = float((actual[name] - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
        if not difference <= allowed:
            raise NotImplementedError(
                f"the tiled loss of `{type(inner).__name__}` is not its own: the {name} is off by {difference:.1e} of "
                f"its largest entry (allowed {allowed:.0e}), so the model does something between its head and its "
                "loss that its configuration does not say; train it without a tiled loss."
            )


def _loss_and_gradient(model: torch.nn.Module, inner: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of one forward with the model as it is now."""
    seen: list[torch.Tensor] = []

    handle = inner.get_input_embeddings().register_forward_hook(lambda *call: as_leaf(call[-1], seen))
    try:
        with torch.enable_grad():
            loss = model(**_labelled_rows(inner)).loss
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(loss, seen[:1])
    return {"loss": loss.detach(), "gradient of the embeddings": gradient}


def _labelled_rows(model: PreTrainedModel) -> dict[str, torch.Tensor | float]:
    """Two rows of tokens with labels that have nothing to do with them; some are ignored."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids, labels = random_tokens(vocabulary, 2, 2, 9)
    labels[0, 2:4] = IGNORE_INDEX
    device = model.get_input_embeddings().weight.device
    batch = {"input_ids": ids.to(device), "labels": labels.to(device)}
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:  # else transformers passes no count, and the loss is the mean
        batch["num_items_in_batch"] = 7.0
    return batch

"""Let a causal language model compute its own loss tile by tile: `model(..., labels=...)` makes no logits.

How: patches `forward` of this one model. With labels it runs the backbone, then calls the head with one more keyword,
`tiled_loss`, and the head, patched as well, returns the loss instead of logits. The head is called as a module on
purpose: FSDP2 gathers the head's shards in a hook of that call, frees them in another, and reduces their gradients
once that of its input is known. A loss outside of the module would see a shard of the weights. What the keyword
carries is a plain object, in which FSDP2 finds no tensors to round to its precision.

Everything else goes to the forward below: without labels nothing changes, so neither does `generate`. Head and
backbone are looked up at every call, since adapters and wrappers replace them later. Price: none beyond the loss.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..attention.cache_names import OUTPUT_NAME, find_cache
from ..families import expects_unshifted_labels
from ..losses.logits_transform import read_logits_transform
from ..losses.tiled_head import forward_loss, is_linear
from ..losses.tiled_logits import tiled_cross_entropy
from ..losses.tiles import validate_tile_size, wide_dtype
from ..parallel.shard import IGNORE_INDEX
from .instance_forward import InstancePatch, PatchHandle, named_arguments, patch_on, put_on
from .router_losses import asks_for_router_loss, loss_replaced
from .wrapped import backbone_of


TILED_LOSS, _HEAD = "tiled loss", "head of a tiled loss"
# Whose hooks around a head gather, place or convert; any other would be handed a loss where it expects logits.
_LIBRARIES = {"torch", "accelerate", "deepspeed"}


def tile_loss(model: torch.nn.Module, tile_size: int | None = None) -> TiledLossHandle:
    """Patch the forward of one causal language model: with labels it returns the loss and no logits.

    Args:
        model (`PreTrainedModel` or `PeftModel`): any causal language model of transformers; adapters, DDP and FSDP2
            may be put on before or after.
        tile_size (`int`, *optional*): tokens whose logits exist at a time; see [`tiled_cross_entropy`].

    Returns:
        [`TiledLossHandle`]: `remove()` gives the model its own forward back.

    Raises:
        NotImplementedError: the model has no head or backbone to call, its loss is not the causal cross entropy, or
            its logits are treated in a way that is not known.
        RuntimeError: the model computes its loss in tiles of another size already; of the same size is once.
        ValueError: a bad `tile_size`.

    Relations: the loss of the model itself, as `ForCausalLMLoss` computes it, with `labels`, `shift_labels` and
    `num_items_in_batch`; [`prove_tiled_loss`] compares the two. Where no label is valid it is 0, not 0 / 0.
    Normalization: by `num_items_in_batch`, or by the valid tokens.
    Gradient: see [`tiled_cross_entropy`]; each parameter gets its own once.
    Memory: one tile of logits; the output has no logits.
    Communication: that of the head's own hooks.
    """
    validate_tile_size(tile_size)
    model = find_causal_lm(model)
    former = patch_on(model, TILED_LOSS)
    if former is not None and former.tile_size != tile_size:
        raise RuntimeError(
            f"`{type(model).__name__}` computes its loss in tiles already, with `tile_size` ({former.tile_size}): "
            f"call `remove()` on the handle of that `tile_loss` before asking for `tile_size` ({tile_size})."
        )
    _validate_model(model)
    put_on(model, LossPatch(model, tile_size))
    put_on(model.get_output_embeddings(), _HeadPatch())
    return TiledLossHandle(model)


class TiledLossHandle(PatchHandle):
    """What [`tile_loss`] returns; `remove()` gives model and head their own forward back.

    Args:
        model (`PreTrainedModel`): whose forward is patched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, TILED_LOSS, _HEAD)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which the model makes logits, for metrics that need them."""
        patch = patch_on(self.model, TILED_LOSS)
        before, patch.paused = patch.paused, True
        try:
            yield
        finally:
            patch.paused = before


def find_causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The language model inside adapters, DDP and a compiled module; `NotImplementedError` if there is none."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            break
    if not isinstance(model, PreTrainedModel):
        _refuse(model, "it is not a model of transformers")
    return model


class LossPatch(InstancePatch):
    """On a language model: with labels, the loss in tiles.

    Args:
        model (`PreTrainedModel`): what is treated in this way.
        tile_size (`int`, *optional*): tokens of a tile.
    """

    name = TILED_LOSS

    def __init__(self, model: PreTrainedModel, tile_size: int | None) -> None:
        self.tile_size, self.paused = tile_size, False
        # Where somebody asks for the losses of single tokens: those of the last forward.
        self.keeps_token_losses = False
        self.token_losses: torch.Tensor | None = None
        self.scale, self.softcap = read_logits_transform(model.config)

    def call(self, module: PreTrainedModel, own: Callable, *args, **kwargs):
        named = named_arguments(module, args, kwargs)
        kept = named.get("logits_to_keep")
        keeps_all = kept is None or (isinstance(kept, int) and kept == 0)
        if self.paused or named.get("labels") is None or not keeps_all:
            return own(*args, **kwargs)
        if asks_for_router_loss(module, named):
            return _forward_with_router_loss(module, self, own, **named)
        return _forward_with_loss(module, self, **named)


class _LossRequest:
    """What the model passes to its head: labels, and how the loss of them is computed.

    Not a dataclass: FSDP2 takes those apart on their way through a forward.
    """

    def __init__(self, patch: LossPatch, labels: torch.Tensor, num_items, ignore_index: int) -> None:
        self.labels = labels
        self.settings: dict[str, Any] = {"tile_size": patch.tile_size, "scale": patch.scale, "softcap": patch.softcap}
        self.settings |= {"num_items": num_items, "ignore_index": ignore_index}
        self.patch = patch

    def compute(self, head: torch.nn.Module, own: Callable, hidden: torch.Tensor) -> torch.Tensor:
        labels = self.labels.to(hidden.device)
        if self.patch.keeps_token_losses:
            self.patch.token_losses = torch.zeros(labels.shape, dtype=wide_dtype(hidden.dtype), device=hidden.device)
            self.settings["token_losses"] = self.patch.token_losses
        if not is_linear(head) or getattr(own, "__func__", None) is not type(head).forward:
            return forward_loss(hidden, head, own, labels, **self.settings)
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(head.weight.dtype)  # recurrent models do, before they call their head
        return tiled_cross_entropy(hidden, head.weight, labels, bias=head.bias, **self.settings)


class _HeadPatch(InstancePatch):
    """On the head: the loss of a request instead of logits."""

    name = _HEAD

    def call(self, module: torch.nn.Module, own: Callable, *args, tiled_loss: _LossRequest | None = None, **kwargs):
        return own(*args, **kwargs) if tiled_loss is None else tiled_loss.compute(module, own, *args)


@can_return_tuple
def _forward_with_loss(
    self,
    patch: LossPatch,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    ignore_index: int = IGNORE_INDEX,
    logits_to_keep: int = 0,
    **kwargs,
) -> CausalLMOutputWithPast:
    """The backbone, then the head with a loss request."""
    outputs = backbone_of(self)(**kwargs)
    return CausalLMOutputWithPast(
        loss=_tiled_loss(self, patch, outputs[0], labels, shift_labels, num_items_in_batch, ignore_index),
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
        **{OUTPUT_NAME: find_cache(outputs)},
    )


@can_return_tuple
def _forward_with_router_loss(self, patch: LossPatch, own: Callable, **named):
    """The forward below on the logits of one token, with the tiled loss where it calls its own; it adds the rest."""
    if "logits_to_keep" not in inspect.signature(type(self).forward).parameters:
        _refuse(
            self, "its forward makes all logits to add a router loss", "set `output_router_logits` to `False`, or "
        )
    hidden: list[torch.Tensor] = []

    def loss(logits, labels, *args, shift_labels=None, num_items_in_batch=None, ignore_index=IGNORE_INDEX, **kwargs):
        return _tiled_loss(self, patch, hidden[-1], labels, shift_labels, num_items_in_batch, ignore_index)

    handle = backbone_of(self).register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    try:
        with loss_replaced(self, loss):
            outputs = own(**{**named, "logits_to_keep": 1})
    finally:
        handle.remove()
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})


def _tiled_loss(
    model: PreTrainedModel, patch: LossPatch, hidden: torch.Tensor, labels, shift_labels, num_items, ignore_index: int
) -> torch.Tensor:
    """The loss of the backbone's outputs, from the model's head as it is now."""
    if shift_labels is None:  # the token after mine, as `ForCausalLMLoss` shifts
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.numel() == hidden.shape[:-1].numel():
        shift_labels = shift_labels.reshape(hidden.shape[:-1])
    head = model.get_output_embeddings()
    if patch_on(head, _HEAD) is None:  # an adapter has replaced it
        put_on(head, _HeadPatch())
    _validate_hooks(model, head)
    return head(hidden, tiled_loss=_LossRequest(patch, shift_labels, num_items, ignore_index))


def _refuse(model: torch.nn.Module, reason: str, remedy: str = "") -> None:
    raise NotImplementedError(
        f"the loss of `{type(model).__name__}` cannot be tiled: {reason}; {remedy}train it without a tiled loss."
    )


def _validate_model(model: PreTrainedModel) -> None:
    """Raise `NotImplementedError` for what the configuration and the class tell."""
    if getattr(model.config, "is_encoder_decoder", False):
        _refuse(model, "it makes its decoder's inputs from the labels")
    if backbone_of(model) is model:
        _refuse(model, f"it has no backbone under `{model.base_model_prefix}` that could run without the head")
    if not isinstance(model.get_output_embeddings(), torch.nn.Module):
        _refuse(model, "`get_output_embeddings()` names no head")
    if expects_unshifted_labels(model.config):
        _refuse(model, "its own compares each token with its own label, not with the next one")
    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", repr(model.loss_function))
        _refuse(model, f"its own is `{name}`, not the cross entropy of the next token")


def _validate_hooks(model: PreTrainedModel, head: torch.nn.Module) -> None:
    """Raise `NotImplementedError` if a user's hook would be handed a loss instead of logits."""
    kinds = (head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)
    for hook in (hook for hooks in kinds for hook in hooks.values()):
        origin = getattr(hook, "__module__", None) or type(hook).__module__
        if origin.partition(".")[0] not in _LIBRARIES:
            name = getattr(hook, "__qualname__", type(hook).__name__)
            _refuse(model, f"the hook `{name}` on its head expects logits", "remove the hook, or ")

"""Let a causal language model compute its own loss tile by tile: `model(..., labels=...)` makes no logits.

How: the model's `forward` is covered on this one object. With labels it runs the backbone, then calls the head with
one more keyword, `tiled_loss`, and the head, covered as well, answers with the loss instead of logits. The head is
called as a module on purpose: FSDP2 gathers the head's shards in a hook of that call, frees them in another, and
reduces their gradients once that of its input is known. A loss beside the module would see a shard of the weights.
What the keyword carries is a plain object, in which FSDP2 finds no tensors to round to its precision.

Everything else goes to the forward as it was: without labels nothing changes, so neither does `generate`. Head and
backbone are looked up at every call, since adapters and wrappers replace them later. Price: none beside the loss.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import MethodType

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..attention.cache_names import OUTPUT_NAME, find_cache
from ..losses.logits_transform import read_logits_transform
from ..losses.tiled_head import forward_loss, is_linear
from ..losses.tiled_logits import tiled_cross_entropy
from ..losses.tiles import validate_tile_size
from ..parallel.shard import IGNORE_INDEX
from .unshifted_labels import aligns_labels


PLAN, _COVERED = "_tiled_loss", "_forward_under_tiled_loss"
# Whose hooks around a head gather, place or convert; any other would be handed a loss where it expects logits.
_HOSTS = {"torch", "accelerate", "deepspeed"}


def tile_loss(model: torch.nn.Module, tile_size: int | None = None) -> TiledLossHandle:
    """Cover the forward of one causal language model: with labels it returns the loss and no logits.

    Args:
        model (`PreTrainedModel` or `PeftModel`): any causal language model of transformers; adapters, DDP and FSDP2
            may be put on before or after.
        tile_size (`int`, *optional*): tokens whose logits exist at a time; see [`tiled_cross_entropy`].

    Returns:
        [`TiledLossHandle`]: `remove()` gives the model its own forward back.

    Raises:
        NotImplementedError: the model has no head or backbone to call, its loss is not the causal cross entropy, or
            its logits are treated in a way that is not known.
        RuntimeError: the model is covered already.
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
    former = vars(model).get(PLAN)
    if former is not None and not former.removed:
        raise RuntimeError(
            f"`{type(model).__name__}` computes its loss in tiles already: call `remove()` on the handle of the first "
            "`tile_loss` before the next."
        )
    _validate_model(model)
    plan = TilePlan(model, tile_size)
    if former is not None:
        plan.covers = former.covers  # still there, under those of another
    setattr(model, PLAN, plan)
    plan.cover(model, _model_forward(type(model)))
    plan.cover(model.get_output_embeddings(), _head_forward)
    return TiledLossHandle(model)


class TiledLossHandle:
    """What [`tile_loss`] returns.

    Args:
        model (`PreTrainedModel`): whose forward is covered.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which the model makes logits, for metrics that need them."""
        plan = vars(self.model)[PLAN]
        before, plan.active = plan.active, False
        try:
            yield
        finally:
            plan.active = before

    def remove(self) -> None:
        """Give model and head their own forward back. Where another has covered it since, ours steps aside."""
        plan = vars(self.model).get(PLAN)
        if plan is not None:
            plan.active, plan.removed = False, True
            if plan.uncover():
                delattr(self.model, PLAN)


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


class TilePlan:
    """How one model's loss is tiled, and what was covered for it.

    Not a dataclass, and nor is a question to the head: FSDP2 takes those apart on their way through a forward.
    """

    def __init__(self, model: PreTrainedModel, tile_size: int | None) -> None:
        self.tile_size = tile_size
        self.scale, self.softcap = read_logits_transform(model.config)
        self.parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.active, self.removed = True, False
        self.covers: list[tuple[torch.nn.Module, MethodType]] = []

    def applies(self, kwargs: dict[str, object]) -> bool:
        """Whether this call of the model wants a loss over all its tokens."""
        kept = kwargs.get("logits_to_keep")
        keeps_all = kept is None or (isinstance(kept, int) and kept == 0)
        return self.active and kwargs.get("labels") is not None and keeps_all

    def cover(self, module: torch.nn.Module, forward: Callable) -> None:
        """Put `forward` over the module's own, once; a forward that the object had of its own is kept below."""
        if any(module is covered for covered, _ in self.covers):
            return
        if "forward" in vars(module):
            setattr(module, _COVERED, vars(module)["forward"])
        module.forward = MethodType(forward, module)
        self.covers.append((module, module.forward))

    def uncover(self) -> bool:
        """Undo every `cover` that nobody has covered again; whether those were all."""
        left = []
        for module, forward in self.covers:
            if vars(module).get("forward") != forward:
                left.append((module, forward))
                continue
            del module.forward
            if _COVERED in vars(module):
                module.forward = vars(module).pop(_COVERED)
        self.covers = left
        return not left


class _Question:
    """What the model asks its head: the loss of these labels."""

    def __init__(self, plan: TilePlan, labels: torch.Tensor, num_items, ignore_index: int) -> None:
        self.labels = labels
        self.settings = {"tile_size": plan.tile_size, "scale": plan.scale, "softcap": plan.softcap}
        self.settings |= {"num_items": num_items, "ignore_index": ignore_index}

    def answer(self, head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        labels = self.labels.to(hidden.device)
        if not is_linear(head) or _COVERED in vars(head):
            return forward_loss(hidden, head, _own_forward(head), labels, **self.settings)
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(head.weight.dtype)  # recurrent models do, before they call their head
        return tiled_cross_entropy(hidden, head.weight, labels, bias=head.bias, **self.settings)


def _backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head, or itself if it has none apart from it."""
    backbone = model.base_model
    return getattr(model, "model", model) if backbone is model else backbone  # Llama 4's prefix names nothing


def _own_forward(module: torch.nn.Module) -> Callable:
    """The forward that is covered."""
    return vars(module).get(_COVERED) or MethodType(type(module).forward, module)


def _model_forward(kind: type) -> Callable:
    """The covering forward of a class of models, with the signature of its own, which hosts inspect."""

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        plan = vars(self)[PLAN]
        named = {**dict(zip(plan.parameters, args)), **kwargs}
        if plan.applies(named):
            return _forward_with_loss(self, plan, **named)
        return _own_forward(self)(*args, **kwargs)

    return forward


def _head_forward(self, *args, tiled_loss: _Question | None = None, **kwargs):
    if tiled_loss is None:
        return _own_forward(self)(*args, **kwargs)
    return tiled_loss.answer(self, *args)


@can_return_tuple
def _forward_with_loss(
    self,
    plan: TilePlan,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    ignore_index: int = IGNORE_INDEX,
    logits_to_keep: int = 0,
    **kwargs,
) -> CausalLMOutputWithPast:
    """The backbone, and the head asked for its loss."""
    if kwargs.get("output_router_logits"):
        _refuse(self, "`output_router_logits` asks for a router loss", "leave it out, or ")
    outputs = _backbone(self)(**kwargs)
    hidden = outputs[0]
    if shift_labels is None:  # the token after mine, as `ForCausalLMLoss` shifts
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.numel() == hidden.shape[:-1].numel():
        shift_labels = shift_labels.reshape(hidden.shape[:-1])
    head = self.get_output_embeddings()
    plan.cover(head, _head_forward)  # an adapter may have replaced it
    _validate_hooks(self, head)
    return CausalLMOutputWithPast(
        loss=head(hidden, tiled_loss=_Question(plan, shift_labels, num_items_in_batch, ignore_index)),
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
        **{OUTPUT_NAME: find_cache(outputs)},
    )


def _refuse(model: torch.nn.Module, reason: str, remedy: str = "") -> None:
    raise NotImplementedError(
        f"the loss of `{type(model).__name__}` cannot be tiled: {reason}; {remedy}train it without a tiled loss."
    )


def _validate_model(model: PreTrainedModel) -> None:
    """Raise `NotImplementedError` for what the configuration and the class tell."""
    if getattr(model.config, "is_encoder_decoder", False):
        _refuse(model, "it makes its decoder's inputs from the labels")
    if _backbone(model) is model:
        _refuse(model, f"it has no backbone under `{model.base_model_prefix}` that could run without the head")
    if not isinstance(model.get_output_embeddings(), torch.nn.Module):
        _refuse(model, "`get_output_embeddings()` names no head")
    if aligns_labels(model.config):
        _refuse(model, "its own compares each token with its own label, not with the next one")
    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", repr(model.loss_function))
        _refuse(model, f"its own is `{name}`, not the cross entropy of the next token")
    if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
        _refuse(model, "`config.output_router_logits` asks for a router loss", "set it to `False`, or ")


def _validate_hooks(model: PreTrainedModel, head: torch.nn.Module) -> None:
    """Raise `NotImplementedError` if a stranger's hook would be handed a loss instead of logits."""
    kinds = (head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)
    for hook in (hook for hooks in kinds for hook in hooks.values()):
        origin = getattr(hook, "__module__", None) or type(hook).__module__
        if origin.partition(".")[0] not in _HOSTS:
            name = getattr(hook, "__qualname__", type(hook).__name__)
            _refuse(model, f"the hook `{name}` on its head expects logits", "remove the hook, or ")

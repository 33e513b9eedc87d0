"""The load-balancing loss of routers on shared rows: the model's own function, on the router logits of whole rows.

What: the loss is a product of two means over tokens, to which shares do not add up. So the router logits of all ranks
are brought together, as many numbers a layer as there are experts for each token, and the model's own forward computes
its loss of them. It is the same on every rank of a group, and so is the count of tokens that it leaves out.

How: a patch on the model passes the mask of whole rows to its forward, one on the backbone takes the share of it and
returns the router logits of whole rows. What lies between (the class's own forward, TRL's head) is not touched. The
cross entropy stays that of the share. By `SequenceShard.batch_weight` the router's loss counts as often as it does in
one process: the cross entropy is divided by it before the forward adds the router's loss, and the sum is multiplied.
Price: one all-gather of `T x experts` numbers a layer, one reduce-scatter in backward, and one all-gather of a mask.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..parallel.collectives import gather_integer_rows, gather_rows
from ..parallel.shard import SequenceShard
from .instance_forward import InstancePatch, PatchHandle, named_arguments, patch_on, put_on
from .wrapped import backbone_of, unwrap


ROUTER_LOSS, _BACKBONE = "router loss", "router logits of whole rows"
_FLAG = "output_router_logits"


def follow_router_losses(model: torch.nn.Module) -> PatchHandle:
    """Patch one model whose forward may add the loss of its routers; it is then that of whole rows.

    Args:
        model (`torch.nn.Module`): any; one without routers is left alone. Adapters and wrappers may come before or
            after.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.
    """
    inner = unwrap(model)
    if isinstance(inner, PreTrainedModel) and _has_router_loss(inner):
        put_on(inner, RouterLossPatch())
        put_on(backbone_of(inner), _BackbonePatch())
    return PatchHandle(model, ROUTER_LOSS, _BACKBONE)


def asks_for_router_loss(model: torch.nn.Module, given: dict[str, Any] | None = None) -> bool:
    """Whether a call of a transformers model with these arguments returns router logits, and the loss of them."""
    asked = (given or {}).get(_FLAG)
    return bool(getattr(model.config.get_text_config(decoder=True), _FLAG, False) if asked is None else asked)


def _has_router_loss(model: PreTrainedModel) -> bool:
    names = inspect.signature(type(model).forward).parameters
    known = _FLAG in names or hasattr(model.config.get_text_config(decoder=True), _FLAG)
    return known and backbone_of(model) is not model


@contextlib.contextmanager
def loss_replaced(model: PreTrainedModel, loss: Callable) -> Iterator[list[int]]:
    """A block in which `model.loss_function` is another one; what it yields has an entry for each call of it."""
    kept, calls = vars(model).get("_loss_function"), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return loss(*args, **kwargs)

    vars(model)["_loss_function"] = counted
    try:
        yield calls
    finally:
        del vars(model)["_loss_function"]
        if kept is not None:
            vars(model)["_loss_function"] = kept


class RouterLossPatch(InstancePatch):
    """On a model with a head: its router loss is that of whole rows, and counts once for each group."""

    name = ROUTER_LOSS
    lowest = True  # what computes the loss in tiles calls it

    def call(self, module: PreTrainedModel, own: Callable, *args, **kwargs):
        given = named_arguments(module, args, kwargs)
        shard = given.get("sequence_shard")
        if shard is None or not asks_for_router_loss(module, given):
            return own(*args, **kwargs)
        if shard.size == 1:
            return _weighted(module, shard.batch_weight, own, given)
        rows, backbone = _Rows(module, shard, given), backbone_of(module)
        if patch_on(backbone, _BACKBONE) is None:  # a wrapper has replaced it
            put_on(backbone, _BackbonePatch())
        if rows.mask is not None:
            given["attention_mask"] = rows.whole_mask()
        patch = patch_on(backbone, _BACKBONE)
        patch.rows = rows
        try:
            outputs = _weighted(module, shard.batch_weight, own, given)
        finally:
            patch.rows = None
        if isinstance(outputs, MutableMapping) and outputs.get("router_logits") is not None:
            outputs["router_logits"] = rows.router_logits
        return outputs


def _weighted(module: PreTrainedModel, weight: float, own: Callable, given: dict[str, Any]) -> Any:
    """The outputs of the forward below, whose loss holds `weight` times that of its routers."""
    if weight == 1.0 or given.get("labels") is None:
        return own(**given)
    function, name = module.loss_function, type(module).__name__
    with loss_replaced(module, lambda *args, **kwargs: function(*args, **kwargs) / weight) as calls:
        outputs = own(**given)
    if not isinstance(outputs, MutableMapping):
        raise NotImplementedError(
            f"`{name}` returns a tuple, in which its router loss cannot be weighted: leave `return_dict` at True."
        )
    if outputs.get("loss") is None:
        return outputs
    if len(calls) != 1:
        raise NotImplementedError(
            f"`{name}` adds the loss of its routers to one that it does not compute by `self.loss_function` "
            f"({len(calls)} calls), so the two cannot be told apart: set `output_router_logits` to False."
        )
    outputs["loss"] = outputs["loss"] * weight
    return outputs


class _BackbonePatch(InstancePatch):
    """On the model without its head: takes the mask of whole rows, returns the router logits of whole rows."""

    name = _BACKBONE

    def __init__(self) -> None:
        self.rows: _Rows | None = None  # for the duration of one call

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows = self.rows
        if rows is None:
            return own(*args, **kwargs)
        given = named_arguments(module, args, kwargs)
        if rows.mask is not None:
            given["attention_mask"] = rows.mask
        outputs = own(**given)
        logits = getattr(outputs, "router_logits", None)
        if logits:
            rows.router_logits = logits
            outputs["router_logits"] = rows.whole(logits)
        return outputs


class _Rows:
    """The rows of one call: the share of their mask and router logits, and what all ranks together have.

    Args:
        model (`PreTrainedModel`): for messages.
        shard ([`SequenceShard`]): bound to its group.
        given (`dict`): the arguments of the call by name.
    """

    def __init__(self, model: PreTrainedModel, shard: SequenceShard, given: dict[str, Any]) -> None:
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        self.count, self.shard, self.model = tokens.shape[0], shard, model
        self.mask: torch.Tensor | None = given.get("attention_mask")
        self.router_logits: Any = None

    def whole_mask(self) -> torch.Tensor:
        """`(B, T)`: without the tokens that were added so that the row could be cut."""
        assert self.mask is not None
        parts = gather_integer_rows(self.mask.to(torch.int64), self.shard.group)
        return self._joined(parts.flatten(0, 1)[..., None])[..., 0].to(self.mask.dtype)

    def whole(self, logits: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The same of all tokens of the rows, each layer laid out as the model has it."""
        device = logits[0].device
        layouts = [self._layout(layer) for layer in logits]
        columns = [self._by_token(layer.to(device), layout) for layer, layout in zip(logits, layouts)]
        found: list[torch.Tensor] = list(columns)
        alike: dict[tuple, list[int]] = {}
        for index, column in enumerate(columns):
            alike.setdefault((column.shape[1], column.dtype), []).append(index)
        for indices in alike.values():
            counts = [self.count * self.shard.local_len] * self.shard.size
            parts = gather_rows([columns[index] for index in indices], counts, self.shard.group)
            for index, part in zip(indices, parts):
                found[index] = self._joined(part.unflatten(0, (-1, self.shard.local_len)))
        return tuple(self._laid_out(*items) for items in zip(found, logits, layouts))

    def _joined(self, parts: torch.Tensor) -> torch.Tensor:
        """`(P * B, t, D)`, ranks outermost, to `(B, T, D)`."""
        rows = parts.unflatten(0, (self.shard.size, self.count)).transpose(0, 1)
        return rows.flatten(1, 2)[:, : self.shard.num_tokens]

    def _layout(self, layer: torch.Tensor) -> str:
        """Where a layer's router logits have their tokens."""
        flat, shape = self.count * self.shard.local_len, layer.shape
        if layer.dim() == 2 and shape[0] == flat:
            return "flat"
        if layer.dim() == 3 and shape[:2] == (self.count, self.shard.local_len):
            return "rows"
        if layer.dim() == 3 and shape[1] == flat:
            return "second"  # product keys have two sets of logits
        raise NotImplementedError(
            f"`{type(self.model).__name__}` returns router logits of shape {tuple(shape)} for {self.count} rows of "
            f"{self.shard.local_len} tokens, in which no dimension is that of the tokens: set `{_FLAG}` to False."
        )

    def _by_token(self, layer: torch.Tensor, layout: str) -> torch.Tensor:
        if layout == "second":
            layer = layer.transpose(0, 1)
        return layer.flatten(1) if layout != "rows" else layer.flatten(0, 1)

    def _laid_out(self, rows: torch.Tensor, like: torch.Tensor, layout: str) -> torch.Tensor:
        if layout == "rows":
            return rows
        flat = rows.flatten(0, 1)
        return flat if layout == "flat" else flat.unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)

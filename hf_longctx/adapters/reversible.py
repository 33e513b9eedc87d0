"""Reversible layers: a model keeps two streams of its tokens for backward, however many layers it has.

What: [`make_reversible`] runs the layers of a model as a reversible network does. That is another model than the one
stream that it was written for, so it is for models that train from scratch, or with `convert=True`. The weights keep
their names. `model.config` says so, and a saved model is made reversible again by `adapt`, the trainers or
`make_reversible`, and refused by our attention where none of them was called.

How: the model's own forward runs, masks and positions included. Each layer only notes how it was called, and the last
one runs all of them ([`two_streams`][hf_longctx.adapters.two_streams]). See [`half_layers`] for how a layer is halved.
Price: one more forward of every layer. Without gradients (evaluation, `generate`) nothing is kept, and a cache works.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..attention.cache_names import find_cache
from ..attention.unadapted import IN_TWO_STREAMS
from .few_tokens import loss_batch, loss_of, own_draws, random_ids, training_mode
from .half_layers import HalfLayers, take_apart
from .instance_forward import InstancePatch, PatchHandle, named_arguments, patch_on, put_on
from .no_rotation import own_config
from .reversible_rules import find_layers, is_trained, validate_call, validate_layers, validate_model
from .two_streams import LayerCall, run_two_streams
from .wrapped import unwrap


logger = logging.getLogger(__name__)

REVERSIBLE = "reversible layers"
_FEW_TOKENS = 6


class ReversibleHandle(PatchHandle):
    """What [`make_reversible`] returns; `remove()` gives the model its one stream back, and clears its config."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model, REVERSIBLE)

    def remove(self) -> None:
        self.take_off()
        for config in _configs(unwrap(self.model)):
            vars(config).pop(IN_TWO_STREAMS, None)

    def take_off(self) -> None:
        """The patches and marks alone; the configuration stays as it is."""
        super().remove()
        for module in self.model.modules():
            vars(module).pop(IN_TWO_STREAMS, None)


def make_reversible(model: torch.nn.Module, convert: bool | Mapping[str, Any] = False) -> ReversibleHandle:
    """Let the layers of a model run in two streams, so that what it keeps for backward does not grow with its depth.

    Layer by layer `y1 = x1 + attention(x2)` and `y2 = x2 + mlp(y1)`, each with its norms; both streams start as the
    embedded tokens, and the model's last norm gets their mean. Losses and gradients are those of plain autograd on
    the same two streams, to the bit.

    Args:
        model (`torch.nn.Module`): a transformers model with one stack of layers of two halves; changed in place, on
            this instance only. DDP, FSDP2 of the whole model, LoRA and tiled MLPs may come before or after.
        convert (`bool` or `Mapping`, *optional*, defaults to `False`): make a model reversible whose weights were
            trained in one stream. Its loss before and after is logged, of the batch that is given here or of random
            tokens: it has to be trained again.

    Returns:
        [`ReversibleHandle`]: `remove()` undoes it. A second call changes nothing.

    Raises:
        ValueError: the weights were loaded from a model of one stream, and `convert` is not set; the configuration
            was written by another version.
        NotImplementedError: it has no such stack, its layers cannot be taken apart, a wrapper shards or checkpoints
            single layers, or hooks read their outputs.
        RuntimeError: its weights are not loaded yet.

    Communication: none. Gradient: one a parameter; all of the stack's arrive together at its end.
    Memory: between forward and backward `2 x B x t x D` in float64; in backward two more for gradients.
    Source: RevNet, https://huggingface.co/papers/1707.04585; Reformer, https://huggingface.co/papers/2001.04451.
    """
    if not isinstance(convert, (bool, Mapping)):
        raise ValueError(f"`convert` ({convert!r}) must be true, false or a batch of the model's arguments.")
    inner = unwrap(model)
    owner, name = find_layers(inner)
    layers = getattr(owner, name)
    if patch_on(owner, REVERSIBLE) is not None:
        return ReversibleHandle(model)
    validate_model(inner, layers)
    known = is_recorded(inner)
    if is_trained(layers) and not known and convert is False:
        raise ValueError(
            f"`{type(inner).__name__}` has weights that were trained in one stream, and two streams are another model "
            "with another loss: build a new one (`AutoModelForCausalLM.from_config(config)`), or pass `convert=True` "
            "to train this one further in two streams."
        )
    converts = convert is not False and not known
    batch = loss_batch(inner, convert) if converts else {}
    before = loss_of(model, batch) if converts else None
    put_on(owner, _StackPatch(name))
    for layer in layers:
        put_on(layer, _LayerPatch())
        for module in layer.modules():  # attention looks for it
            vars(module)[IN_TWO_STREAMS] = True
    handle = ReversibleHandle(model)
    try:
        _take_layers_apart(model, owner)
    except BaseException:
        handle.take_off()
        raise
    _record(inner)
    if converts:
        logger.warning(
            f"`{type(inner).__name__}` now runs in two streams, which is another model: its loss went from "
            f"{before:.4f} to {loss_of(model, batch):.4f}; train it further."
        )
    return handle


def follow_reversible(model: torch.nn.Module) -> None:
    """Make a model reversible again that was saved so; others are left alone."""
    inner = unwrap(model)
    if is_recorded(inner) and not runs_in_two_streams(inner):
        make_reversible(model)
        logger.info(f"`{type(inner).__name__}` was trained with reversible layers and runs in two streams again")


def runs_in_two_streams(model: torch.nn.Module) -> bool:
    """Whether [`make_reversible`] is on `model`."""
    return any(patch_on(module, REVERSIBLE) is not None for module in model.modules())


def is_recorded(model: torch.nn.Module) -> bool:
    """Whether the configuration of `model` says that its layers were trained in two streams.

    Raises:
        ValueError: it says something that this version does not know.
    """
    found = next((getattr(config, IN_TWO_STREAMS, False) for config in _configs(model)), False)
    if not isinstance(found, bool):
        raise ValueError(
            f"`config.{IN_TWO_STREAMS}` is {found!r}, and this version of hf_longctx knows True only: the model was "
            "trained in other streams; install the version that wrote it."
        )
    return found


def _configs(model: torch.nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    return [] if config is None else [config.get_text_config()]


def _record(model: torch.nn.Module) -> None:
    if not is_recorded(model) and hasattr(model, "config"):
        own_config(model)
        for config in _configs(model):
            setattr(config, IN_TWO_STREAMS, True)


class _StackPatch(InstancePatch):
    """On the module with the layers: their calls are gathered while its own forward runs."""

    name = REVERSIBLE

    def __init__(self, layers: str) -> None:
        self.layers, self.observes, self.told = layers, False, False

    @torch.compiler.disable
    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        layers = list(getattr(module, self.layers))
        given = named_arguments(module, args, kwargs)
        validate_layers(module, layers)
        validate_call(module, layers, given)
        if torch.is_grad_enabled() or self.observes:
            self._without_cache(module, given)
            args, kwargs = (), given
        run = _Run(layers, self.observes)
        patches = [patch_on(layer, REVERSIBLE) for layer in layers]
        for patch in patches:
            patch.run = run
        try:
            output = own(*args, **kwargs)
        finally:
            for patch in patches:
                patch.run = None
        run.finish()
        return output

    def _without_cache(self, module: torch.nn.Module, given: dict[str, Any]) -> None:
        """Training needs no cache, and a layer that runs again in backward would write to it twice."""
        if find_cache(given) is not None:
            raise NotImplementedError(
                f"`{type(module).__name__}` has reversible layers and was given a cache with gradients on, to which "
                "every layer would write a second time in backward: leave the cache out, or run within "
                "`torch.no_grad()`."
            )
        if given.get("use_cache") and not self.told:
            logger.warning("`use_cache` has no effect on reversible layers with gradients: layers run twice then")
            self.told = True
        if "use_cache" in inspect.signature(type(module).forward).parameters or given.get("use_cache"):
            given["use_cache"] = False


class _LayerPatch(InstancePatch):
    """On a layer: notes its call, and runs all layers if it is the last."""

    name = REVERSIBLE

    def __init__(self) -> None:
        self.halves: HalfLayers | None = None
        self.run: _Run | None = None

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        if self.run is None:
            raise RuntimeError(
                f"`{type(module).__name__}` was called outside of a forward of its model, but its layers run "
                "together, in two streams: call the model, or `remove()` the handle of `make_reversible`."
            )
        return self.run.add(self, module, own, args, kwargs)


class _Run:
    """One forward of a stack."""

    def __init__(self, layers: list[torch.nn.Module], observes: bool) -> None:
        self.layers, self.observes = layers, observes
        self.calls: list[LayerCall] = []
        self.tokens: torch.Tensor | None = None
        self.version = 0

    def add(self, patch: _LayerPatch, layer: torch.nn.Module, own: Callable, args: tuple, kwargs: dict[str, Any]):
        """The call of a layer; returns what its caller takes for its output."""
        tokens, args, kwargs = _split_tokens(layer, args, kwargs)
        if len(self.calls) >= len(self.layers) or layer is not self.layers[len(self.calls)]:
            self._refuse(layer, "runs its layers in another order than they are listed, or one of them twice")
        if self.observes:
            patch.halves, returned = take_apart(layer, own, tokens, args, kwargs)
            self.calls.append(LayerCall(layer, own, patch.halves, args, kwargs))
            return returned
        if self.tokens is not None and (tokens is not self.tokens or tokens._version != self.version):
            self._refuse(layer, "changes the hidden states between two layers")
        self.tokens, self.version = tokens, tokens._version
        assert patch.halves is not None, "a patch that was not taken apart"
        self.calls.append(LayerCall(layer, own, patch.halves, args, kwargs))
        if len(self.calls) == len(self.layers):
            tokens, self.tokens = run_two_streams(self.calls, tokens), None
        return patch.halves.answer("", tokens)

    def finish(self) -> None:
        """Raise `NotImplementedError` if some of the layers did not run."""
        if len(self.calls) < len(self.layers):
            self._refuse(self.layers[0], f"ran {len(self.calls)} of its {len(self.layers)} layers")

    def _refuse(self, layer: torch.nn.Module, what: str) -> None:
        raise NotImplementedError(
            f"the model of `{type(layer).__name__}` {what}, which cannot be undone in backward: reversible layers run "
            "all, in order and with nothing between them (`layerdrop` 0); train it with activation checkpointing."
        )


def _split_tokens(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]):
    if args:
        return args[0], args[1:], kwargs
    first = next(iter(named_arguments(layer, (None,), {})))
    rest = dict(kwargs)
    return rest.pop(first), (), rest


def _take_layers_apart(model: torch.nn.Module, owner: torch.nn.Module) -> None:
    """Run the model on a few tokens, and halve and prove every layer, with dropout."""
    patch = patch_on(owner, REVERSIBLE)
    patch.observes = True
    try:
        with training_mode(model), torch.no_grad(), own_draws(model):
            model(input_ids=random_ids(unwrap(model), 2, _FEW_TOKENS))
    finally:
        patch.observes = False

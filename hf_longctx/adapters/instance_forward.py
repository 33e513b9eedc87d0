"""The one way to patch `forward` on a module instance, and to undo it.

Every adapter goes through here, so all of them keep the same rules:

- A forward that was set on the instance before is kept below and called; without one, the class's forward is.
- Taking a patch off restores what was there. If another patch of ours came on top, ours is taken out from under it. If
  anything else did, ours stays where it is and becomes a no-op, since what is on top may call it.
- One patch of a name on a module: putting it on again replaces its settings and keeps its place.
- `copy.deepcopy` and pickle keep patches, bound to the copy. PEFT, DDP, FSDP2 and accelerate may wrap before or after:
  hooks run outside of a patch, and `inspect.signature` shows the arguments of the forward below.

Price: one Python call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch


# In `vars(module)`: from the method and the name of a patch to its layer.
_LAYERS = "_hf_longctx_layers"


class InstancePatch:
    """What an adapter puts over one method of one module; a subclass has a name and a `call`.

    Patches are copied and pickled with their module, so they hold plain settings and no other module. One that needs
    the method of the class itself is `lowest`: it goes below the patches that are there.
    """

    name: str
    lowest = False

    def call(self, module: torch.nn.Module, own: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the method.

        Args:
            module (`torch.nn.Module`): the instance.
            own (`Callable`): the method below this patch, bound.
            args, kwargs: of the call.
        """
        raise NotImplementedError


class _Layer:
    """A patch, whether it acts, and the instance's own callable below it, if there was one."""

    def __init__(self, patch: InstancePatch, below: Callable | None) -> None:
        self.patch, self.below, self.active = patch, below, True


class InstanceForward:
    """The callable in an instance's `__dict__`. It is bound to its module and holds nothing but names."""

    def __init__(self, module: torch.nn.Module, method: str, name: str) -> None:
        self.module, self.method, self.name = module, method, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        return _run(self.module, self.method, self.name, *args, **kwargs)

    @property
    def __func__(self) -> Callable:
        """As of a bound method: accelerate wraps this function and binds the result to the module again."""
        method, name = self.method, self.name

        def forward(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
            return _run(module, method, name, *args, **kwargs)

        told: Any = forward  # a function takes attributes
        told.__signature__ = inspect.signature(getattr(type(self.module), method))
        told.instance_patch = (method, name)
        return forward

    @property
    def __wrapped__(self) -> Callable:
        """What accelerate finds when it takes its mixed precision off: it binds this to the module."""
        return self.__func__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(own_method(self.module, self.name, self.method))


def put_on(module: torch.nn.Module, patch: InstancePatch, method: str = "forward") -> None:
    """Put `patch` over a method of `module`, or replace the settings of the patch of its name that is there.

    Args:
        module (`torch.nn.Module`): changed in place, on this instance only.
        patch ([`InstancePatch`]): runs instead of the method from now on.
        method (`str`, *optional*, defaults to `"forward"`): the method.
    """
    layers = vars(module).setdefault(_LAYERS, {})
    layer = layers.get((method, patch.name))
    if layer is not None:
        layer.patch, layer.active = patch, True
        return
    mine = InstanceForward(module, method, patch.name)
    bottom = _bottom(module, method) if patch.lowest else None
    if bottom is None:
        layers[method, patch.name] = _Layer(patch, vars(module).get(method))
        setattr(module, method, mine)
    else:
        layers[method, patch.name] = _Layer(patch, bottom.below)
        bottom.below = mine


def take_off(module: torch.nn.Module, name: str, method: str = "forward") -> None:
    """Take the patch of this name off `module`, or make it a no-op where something else lies on top of it."""
    layers = vars(module).get(_LAYERS, {})
    layer = layers.get((method, name))
    if layer is None:
        return
    above = next((other for other in layers.values() if _is_patch(other.below, method, name)), None)
    if _is_patch(vars(module).get(method), method, name):
        delattr(module, method)
        if layer.below is not None:
            setattr(module, method, layer.below)
    elif above is not None:
        above.below = layer.below
    else:
        layer.active = False
        return
    del layers[method, name]
    if not layers:
        delattr(module, _LAYERS)


def patch_on(module: torch.nn.Module, name: str, method: str = "forward") -> Any:
    """The patch of this name, of the class that the name stands for, that acts on `module`, or `None`."""
    layer = vars(module).get(_LAYERS, {}).get((method, name))
    return layer.patch if layer is not None and layer.active else None


def patches_on(module: torch.nn.Module) -> list[InstancePatch]:
    """The patches that act on a method of `module`."""
    return [layer.patch for layer in vars(module).get(_LAYERS, {}).values() if layer.active]


def own_method(module: torch.nn.Module, name: str, method: str = "forward") -> Callable:
    """What the patch of this name wraps: the instance's callable below it, or the method of its class."""
    layer = vars(module).get(_LAYERS, {}).get((method, name))
    return getattr(module, method) if layer is None else _below(module, method, layer)


def named_arguments(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module.forward` by name, also those that were given by position."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


class PatchHandle:
    """What an adapter returns.

    Args:
        model (`torch.nn.Module`): whose modules are patched; those that joined since are found too.
        names (`str`): of the patches.
    """

    def __init__(self, model: torch.nn.Module, *names: str) -> None:
        self.model, self.names = model, names

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The modules on which one of the patches acts."""
        return [
            module
            for module in self.model.modules()
            for method, name in vars(module).get(_LAYERS, {})
            if name in self.names and patch_on(module, name, method) is not None
        ]

    def remove(self) -> None:
        """Take every patch off; see [`take_off`]. A second call does nothing."""
        for module in self.model.modules():
            for method, name in list(vars(module).get(_LAYERS, {})):
                if name in self.names:
                    take_off(module, name, method)


def _run(module: torch.nn.Module, method: str, name: str, *args: object, **kwargs: object) -> object:
    layer = vars(module).get(_LAYERS, {}).get((method, name))
    if layer is None:  # taken off while somebody kept the callable
        return getattr(type(module), method)(module, *args, **kwargs)
    own = _below(module, method, layer)
    return layer.patch.call(module, own, *args, **kwargs) if layer.active else own(*args, **kwargs)


def _below(module: torch.nn.Module, method: str, layer: _Layer) -> Callable:
    # The class is looked up now: FSDP2 gives a module a class of its own.
    return layer.below if layer.below is not None else MethodType(getattr(type(module), method), module)


def _bottom(module: torch.nn.Module, method: str) -> _Layer | None:
    """The layer below which there is none of ours, where one of ours is what a call of the method reaches first."""
    layers = vars(module).get(_LAYERS, {})
    found, bottom = vars(module).get(method), None
    while True:
        above = [layer for (of, name), layer in layers.items() if of == method and _is_patch(found, method, name)]
        if not above:
            return bottom
        bottom, found = above[0], above[0].below


def _is_patch(found: object, method: str, name: str) -> bool:
    """Whether a callable is the patch of this name, also where accelerate has bound its function anew."""
    if isinstance(found, InstanceForward):
        return (found.method, found.name) == (method, name)
    return isinstance(found, MethodType) and getattr(found.__func__, "instance_patch", None) == (method, name)

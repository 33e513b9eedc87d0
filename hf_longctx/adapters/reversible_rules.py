"""What reversible layers cannot be combined with, each in a sentence before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_layers import GradientCheckpointingLayer


# Hooks that wait in every layer once hidden states were asked for; asking for them again is refused by itself.
_CAPTURE = "transformers.utils.output_capturing"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INSTEAD = "train this model with activation checkpointing instead"


def find_layers(model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The module that has the layers of `model`, and the name of their list in it.

    Raises:
        NotImplementedError: there is no list of layers, or more than one.
    """
    names = {kind for module in model.modules() for kind in getattr(module, "_no_split_modules", None) or ()}
    found = [
        (owner, name, f"{path}.{name}".lstrip("."))
        for path, owner in model.named_modules()
        for name, child in owner.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) and all(_is_layer(m, names) for m in child)
    ]
    if len(found) == 1:
        return found[0][:2]
    kind = type(model).__name__
    if not found:
        raise NotImplementedError(
            f"`{kind}` has no list of transformers' layers that could be reversible: {_INSTEAD}."
        )
    raise NotImplementedError(
        f"`{kind}` has {len(found)} lists of layers ({', '.join(f'`{path}`' for *_, path in found)}), and reversible "
        "layers are one stack: use the class of its text part, or call this on the part with one list."
    )


def _is_layer(module: torch.nn.Module, names: set[str]) -> bool:
    module = getattr(module, "_checkpoint_wrapped_module", module)
    return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in names


def is_trained(layers: torch.nn.ModuleList) -> bool:
    """Whether `from_pretrained` loaded weights of these layers."""
    return any(getattr(parameter, "_is_hf_initialized", False) for parameter in layers.parameters())


def validate_model(model: torch.nn.Module, layers: torch.nn.ModuleList) -> None:
    """What can be known before the first forward.

    Raises:
        NotImplementedError: layers are on several devices, on one without float64, or wrapped.
        RuntimeError: weights are placeholders.
    """
    kind = type(model).__name__
    devices = sorted({str(parameter.device) for parameter in layers.parameters()})
    if devices == ["meta"] or any(device == "meta" for device in devices):
        raise RuntimeError(
            f"the weights of `{kind}` are placeholders on the meta device, so its layers cannot be taken apart and "
            "proven: load or initialize them before `make_reversible`."
        )
    if len(devices) > 1:
        raise NotImplementedError(
            f"the layers of `{kind}` are on {len(devices)} devices ({', '.join(devices)}), and two streams are on "
            "one: load the model without `device_map`."
        )
    if devices and devices[0].startswith("mps"):
        raise NotImplementedError(
            f"`{kind}` is on {devices[0]}, which has no float64 for the two streams of reversible layers: {_INSTEAD}."
        )
    validate_layers(model, layers)
    validate_call(model, layers, {})


def validate_layers(owner: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
    """Refuse wrappers and hooks that need layers to run one by one.

    Raises:
        NotImplementedError: there is one.
    """
    for index, layer in enumerate(layers):
        kind = f"`{type(layer).__name__}` {index}"
        if hasattr(layer, "_checkpoint_wrapped_module") or (layer.training and _is_checkpointed(layer)):
            raise NotImplementedError(
                f"{kind} has activation checkpointing, and reversible layers keep nothing that it could free: turn "
                "one of them off (`gradient_checkpointing_disable()`, or `memory='mlp'` in a trainer)."
            )
        if any(isinstance(module, FSDPModule) for module in layer.modules()):
            raise NotImplementedError(
                f"{kind} is sharded by itself, and all reversible layers run inside one operation, after FSDP2 has "
                "freed its weights: call `fully_shard` on the whole model only."
            )
        if any(hasattr(p, "ds_id") or type(p).__name__ == "FlatParameter" for p in layer.parameters()):
            raise NotImplementedError(
                f"a wrapper keeps the parameters of {kind} to itself, as FSDP1 and DeepSpeed ZeRO-3 do, so that their "
                "gradients would be lost in reversible layers: use DDP, or FSDP2 on the whole model."
            )
        _validate_hooks(kind, layer)


def _is_checkpointed(layer: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in layer.modules())


def _validate_hooks(kind: str, layer: torch.nn.Module) -> None:
    hooks = [hook for name in _HOOKS for hook in getattr(layer, name).values()]
    others = [hook for hook in hooks if getattr(hook, "__module__", None) != _CAPTURE]
    if others:
        name = getattr(others[0], "__qualname__", type(others[0]).__name__)
        raise NotImplementedError(
            f"{kind} has a hook (`{name}`) that reads what one layer is given or returns, and reversible layers run "
            "together: remove it, or put it on a module inside of the layer, where it runs once more in backward."
        )


def validate_call(owner: torch.nn.Module, layers: Sequence[torch.nn.Module], given: dict[str, Any]) -> None:
    """Refuse what a forward asks of single layers, by its arguments or its configuration.

    Raises:
        NotImplementedError: outputs of each layer, or a loss of routers.
    """
    config: Any = getattr(owner, "config", None)
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        asked = given.get(name)
        if asked is None and config is not None:
            asked = getattr(config.get_text_config(), name, False)
        if not asked:
            continue
        if name == "output_router_logits":
            raise NotImplementedError(
                "`output_router_logits` adds the loss of routers, whose gradient would not pass reversible layers: "
                "set it to False, or use activation checkpointing."
            )
        raise NotImplementedError(
            f"`{name}` asks for what single layers return, and reversible layers keep two streams of the last one "
            "only: leave it out, or `remove()` the handle of `make_reversible`."
        )

"""Which modules of a model are MLPs that work on each token by itself, found by structure and proved by running them.

Names tell little: `mlp` is a mixture of experts in one model and a dense MLP in the next. So every module inside a
layer is looked at: two or more linear layers, no norm, nothing else that is learned but vectors, and a forward that
takes one tensor. Whatever looks so is run on a few random tokens, whole and in pieces of another order; if the two
differ, it mixes tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..attention.cache_names import CACHE_NAMES
from ..tiny_check import OTHER_TILES, evaluation_mode


# Arguments of modules whose tokens see each other.
_MIXING_ARGUMENTS = {"attention_mask", "position_embeddings", "position_ids", *CACHE_NAMES}
_PROOF_TOKENS = 5


def find_dense_mlps(model: torch.nn.Module) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """Look for dense MLPs by structure alone; nothing is run, so a model without weights will do.

    Args:
        model (`torch.nn.Module`): a transformers model, with adapters and wrappers or not.

    Returns:
        tuple of the modules by their names in `model`, and the names of blocks of experts with a reason each. Experts
        are left alone as a whole, with the router and a shared expert: their routed part is what takes the memory.
    """
    found: dict[str, torch.nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, layer in _layers(model):
        for child_name, child in layer.named_children():
            _search(f"{name}.{child_name}".lstrip("."), child, found, skipped)
    return found, skipped


def layer_classes(model: torch.nn.Module) -> list[str]:
    """The class names of the layers that were searched."""
    return sorted({type(layer).__name__ for _, layer in _layers(model)})


def token_width(mlp: torch.nn.Module) -> int:
    """The size of the tokens that an MLP takes."""
    first = _base(next(module for module in mlp.modules() if _is_linear(module)))
    return first.weight.shape[0] if isinstance(first, Conv1D) else first.in_features


def kind_of(mlp: torch.nn.Module) -> tuple[str, ...]:
    """What MLPs share that one proof serves: their class and those of all modules inside."""
    return tuple(f"{type(module).__module__}.{type(module).__qualname__}" for module in mlp.modules())


def has_weights(mlp: torch.nn.Module) -> bool:
    """Whether the MLP can be run as it stands: its parameters are neither placeholders, nor a share, nor packed."""
    absent = any(p.is_meta or hasattr(p, "to_local") for p in mlp.parameters())
    return not absent and any(p.is_floating_point() for p in mlp.parameters())


@torch.no_grad()
def find_mixing(
    mlp: torch.nn.Module, forward: Callable[[torch.Tensor], object], hidden_states: torch.Tensor | None = None
) -> str | None:
    """Say why `forward` must not be run in tiles, or `None` if it treats each token by itself.

    Args:
        mlp (`torch.nn.Module`): the module; run without dropout, and left in the mode it had.
        forward (`Callable`): its forward.
        hidden_states (`torch.Tensor` of shape `(..., T, D)`, *optional*): tokens to try; random ones by default.
    """
    if hidden_states is None:
        weights = [p for p in mlp.parameters() if p.is_floating_point()]
        shape = (2, _PROOF_TOKENS, token_width(mlp))
        tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weights[0])
    else:
        tokens = hidden_states[..., :_PROOF_TOKENS, :].detach()
    order = torch.randperm(tokens.shape[-2], generator=torch.Generator().manual_seed(0)).to(tokens.device)
    with evaluation_mode(mlp):
        try:
            whole = forward(tokens)
            if not isinstance(whole, torch.Tensor) or whole.shape != tokens.shape:
                answer = tuple(whole.shape) if isinstance(whole, torch.Tensor) else type(whole).__name__
                return f"`{type(mlp).__name__}` answers {tuple(tokens.shape)} tokens with {answer}"
            pieces = [forward(piece.contiguous()) for piece in tokens.index_select(-2, order).split(2, dim=-2)]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            return f"`{type(mlp).__name__}` does not run on {tuple(tokens.shape)} tokens alone ({error})"
    expected = whole.index_select(-2, order)
    difference = float((torch.cat(pieces, dim=-2) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if difference <= OTHER_TILES.of(whole.dtype):
        return None
    return f"`{type(mlp).__name__}` mixes tokens (tiles differ from the whole by {difference:.1e})"


def _layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The layers as transformers marks them: by their base class, or by name in a model with code of its own."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    if layers:
        return layers
    names = {kind for m in model.modules() for kind in getattr(m, "_no_split_modules", None) or ()}
    return [(name, m) for name, m in model.named_modules() if type(m).__name__ in names]


def _search(name: str, module: torch.nn.Module, found: dict, skipped: dict) -> None:
    if _has_experts(module):
        skipped[name] = f"`{type(module).__name__}` routes tokens to experts"
    elif _looks_dense(module):
        found[name] = module
    else:
        for child_name, child in module.named_children():
            _search(f"{name}.{child_name}", child, found, skipped)


def _has_experts(module: torch.nn.Module) -> bool:
    names = [type(module).__name__, *(word for n, m in module.named_children() for word in (n, type(m).__name__))]
    return any("expert" in word.lower() for word in names)


def _looks_dense(module: torch.nn.Module) -> bool:
    units = _linear_units(module)
    if units is None or len(units) < 2:
        return False
    parameters = inspect.signature(type(module).forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) == 2 and not {p.name for p in parameters} & _MIXING_ARGUMENTS  # `self` and the tokens


def _linear_units(module: torch.nn.Module) -> list[torch.nn.Module] | None:
    """The linear layers of a module that learns nothing else but vectors, or `None` for another module."""
    if _is_linear(module):
        return [module]
    other = isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict) or "Norm" in type(module).__name__
    if other or any(p is not None and p.dim() > 1 for p in module._parameters.values()):
        return None
    units: list[torch.nn.Module] = []
    for child in module.children():
        inner = _linear_units(child)
        if inner is None:
            return None
        units += inner
    return units


def _is_linear(module: torch.nn.Module) -> bool:
    base = _base(module)
    named_so = "Linear" in type(base).__name__ and hasattr(base, "in_features")  # quantized ones
    return isinstance(base, torch.nn.Linear | Conv1D) or named_so


def _base(module: torch.nn.Module) -> torch.nn.Module:
    """The layer that an adapter wraps, or the layer itself."""
    while isinstance(getattr(module, "base_layer", None), torch.nn.Module):
        module = module.base_layer
    return module

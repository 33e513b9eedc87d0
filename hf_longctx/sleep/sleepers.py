"""Which models can sleep: a stack of layers with a recurrent state, whose output can be its input again.

Nothing is looked up by model type. A model is asked for what sleep needs: transformers' cache with recurrent states in
it, a final norm that is known from where it stands, inputs that reach its layers as hidden states alone, and layers
that take a state in. The last two are tried once a model: on two vectors and on two windows of a few tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from ..adapters.peft_kinds import check_peft
from ..adapters.wrapped import backbone_of, unwrap
from ..attention.cache_names import CACHE_NAMES
from ..config.sleep import SleepConfig
from ..tiny_check import evaluation_mode, first_ordinary_token
from .cache import SleepCache
from .window_passes import Sleeper, plain_layers


_TRIED = "_hf_longctx_sleeps"  # in `vars(model)`: the kind of device on which its inputs and states were tried
PEFT_WAY = "window by window", "train it without sleep"  # for the message of `check_peft`
_RECURRENT = ("linear_attention", "hybrid", "hybrid_sliding")
_SHARDED = {FSDPModule: "FSDP2", FullyShardedDataParallel: "FSDP"}


class _Reached(Exception):
    """The first layer was reached."""


def check_sleeper(model, config: SleepConfig) -> Sleeper:
    """Refuse a model that cannot sleep as `config` asks.

    Args:
        model (`torch.nn.Module`): a causal language model, wrapped or not.
        config ([`SleepConfig`]): with a window.

    Returns:
        [`Sleeper`]: its parts.

    Raises:
        ValueError: the model has nothing to consolidate into, or `config` does not fit it.
        NotImplementedError: it has, in a way that sleep does not know.
    """
    if not isinstance(config, SleepConfig):
        raise ValueError(
            f"`sleep` ({config!r}) must be given as a `SleepConfig`: `SleepConfig(window=..., passes=...)`."
        )
    check_peft(model, *PEFT_WAY)
    _check_shards(model)
    model = unwrap(model)
    if config.window is None:
        raise ValueError("`window` is unset, so nothing would sleep: pass `SleepConfig(window=..., passes=...)`.")
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(f"`{name}` is no causal language model of transformers, and sleep needs its layers and head.")
    check_states(model.config, name)
    if not model.config.get_text_config(decoder=True).return_dict:
        raise ValueError(
            f"`return_dict` (False) in the configuration of `{name}` makes its parts hand tuples to each other, whose "
            "states and logits have no names: set `model.config.return_dict = True`."
        )
    sleeper = sleeper_of(model)
    _check_layers(sleeper, config)
    _check_routers(model)
    device = model.get_input_embeddings().weight.device.type  # another one may run other kernels
    if device not in (vars(model).get(_TRIED), "meta"):
        _try_inputs(sleeper)
        _try_states(sleeper)
        vars(model)[_TRIED] = device
    return sleeper


def _check_shards(model) -> None:
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    kind = next((kind for module in modules for kind in _SHARDED if isinstance(module, kind)), None)
    if kind is not None:
        raise NotImplementedError(
            f"`{type(unwrap(model)).__name__}` is sharded by {_SHARDED[kind]}, whose units have not been proven to "
            "gather and free their weights N times a step: use DDP."
        )


def check_states(config, name: str) -> None:
    """Refuse a configuration whose layers hold no recurrent state in transformers' cache."""
    text = config.get_text_config(decoder=True)
    kinds = list(getattr(text, "layer_types", None) or [])
    if any(kind in _RECURRENT for kind in kinds):
        return
    if "conv" in kinds:
        raise ValueError(
            f"`{name}` has short convolutions and no recurrent state: there is nothing to consolidate a window into."
        )
    raise ValueError(
        f"`{name}` has no layer with a recurrent state in transformers' cache, so there is nothing to consolidate a "
        "window into: take a hybrid such as qwen3_next, or put recurrent layers in with `hybridize`."
    )


def sleeper_of(model: PreTrainedModel, forward: Callable | None = None) -> Sleeper:
    """The parts of a model that a pass runs."""
    name, backbone = type(model).__name__, backbone_of(model)
    layers = getattr(backbone, "layers", None)
    norms = [child for child in backbone.children() if "norm" in type(child).__name__.lower()]
    if not isinstance(layers, torch.nn.ModuleList) or len(norms) != 1:
        has_parts = model.config.get_text_config(decoder=True) is not model.config
        remedy = ": load its text part alone, with `AutoModelForCausalLM`" if has_parts else ""
        raise NotImplementedError(
            f"`{name}` has no single stack `layers` with one norm behind it ({len(norms)} found), so sleep does not "
            f"know where its hidden states come from{remedy}."
        )
    names = []
    for module in (model, backbone):
        parameters = inspect.signature(type(module).forward).parameters
        found = next((known for known in CACHE_NAMES if known in parameters), None)
        if found is None or "inputs_embeds" not in parameters:
            raise NotImplementedError(
                f"`{type(module).__name__}.forward` takes no cache or no `inputs_embeds`: sleep needs both."
            )
        names.append(found)
    own = model.forward if forward is None else forward
    return Sleeper(model, own, backbone, layers, norms[0], (names[0], names[1]))


def _check_layers(sleeper: Sleeper, config: SleepConfig) -> None:
    cache = SleepCache(sleeper.model.config)
    kernel = longest_kernel(sleeper.layers)
    assert config.window is not None
    if config.window < kernel:
        raise ValueError(
            f"`window` ({config.window}) is shorter than the kernel of the short convolutions ({kernel}): their left "
            f"context would come from several windows; set it to {kernel} or more."
        )
    if not any(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(
            f"`{type(sleeper.model).__name__}` has no attention, so it forgets no keys and has nothing to think over: "
            "train it on whole rows."
        )
    states = [index for index, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionLayer)]
    first, last = config.loop_layers or (0, len(sleeper.layers))
    if last > len(sleeper.layers):
        raise ValueError(
            f"`loop_layers` ({config.loop_layers!r}) reaches past the {len(sleeper.layers)} layers of "
            f"`{type(sleeper.model).__name__}`."
        )
    if not any(first <= index < last for index in states):
        raise ValueError(
            f"`loop_layers` ({config.loop_layers!r}) holds no recurrent layer, so its passes would consolidate "
            f"nothing: take in one of {states}."
        )
    if config.eviction == "sliding" and any(cache.is_sliding):
        raise NotImplementedError(
            f"`{type(sleeper.model).__name__}` has attention layers with a window of their own, whose mask "
            "`eviction='sliding'` would replace: use `eviction='hard'`."
        )
    attention = sleeper.model.config.get_text_config()._attn_implementation
    if config.eviction == "sliding" and attention not in ("eager", "sdpa"):
        raise NotImplementedError(
            f"`eviction='sliding'` hands attention a mask, which attn_implementation={attention!r} does not take: "
            "load the model with 'sdpa' or 'eager', or use `eviction='hard'`."
        )


def _check_routers(model) -> None:
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise NotImplementedError(
            f"`{type(model).__name__}` adds a loss of its routers (`output_router_logits` is True), which N "
            "passes would count N times: set `model.config.output_router_logits = False`."
        )


@torch.inference_mode(False)
@torch.enable_grad()
def _try_inputs(sleeper: Sleeper) -> None:
    """Send two vectors to the first layer: nothing but the hidden states that it gets may come from them."""
    weight = sleeper.model.get_input_embeddings().weight
    size = sleeper.model.config.get_text_config().hidden_size
    vectors = torch.ones(1, 2, size, device=weight.device, dtype=weight.dtype, requires_grad=True)
    seen: list[Any] = []

    def stop(module, args, kwargs):
        seen.extend([args, kwargs] if args else [kwargs.pop("hidden_states", None), kwargs])
        raise _Reached

    handle = sleeper.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with plain_layers(sleeper.model):
            sleeper.backbone(inputs_embeds=vectors, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    tensors = list(_tensors_in(seen))
    if not tensors or tensors[0].shape != vectors.shape or not tensors[0].requires_grad:
        raise NotImplementedError(
            f"`{type(sleeper.model).__name__}` does not hand `inputs_embeds` to its first layer as hidden states of "
            "their shape, so they cannot be read again: sleep cannot loop it."
        )
    if any(_comes_from(tensor, vectors) for tensor in tensors[1:]):
        raise NotImplementedError(
            f"`{type(sleeper.model).__name__}` shows its layers the embeddings of the tokens beside the hidden "
            "states, and a second pass would show them hidden states twice: sleep cannot loop it."
        )


def _tensors_in(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors_in(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors_in(value)


def _comes_from(tensor: torch.Tensor, source: torch.Tensor) -> bool:
    if not tensor.requires_grad:
        return False
    return torch.autograd.grad(tensor.sum(), source, allow_unused=True, retain_graph=True)[0] is not None


@torch.inference_mode(False)
@torch.enable_grad()
def _try_states(sleeper: Sleeper) -> None:
    """Read two short windows: layers, or their kernels, must take a state in and hand its gradient back."""
    name, kernel = type(sleeper.model).__name__, max(longest_kernel(sleeper.layers), 2)
    weight = sleeper.model.get_input_embeddings().weight
    tokens = torch.full((1, kernel), first_ordinary_token(weight.shape[0]), device=weight.device)
    cache = SleepCache(sleeper.model.config)
    inputs = {"input_ids": tokens, "use_cache": True}
    with evaluation_mode(sleeper.model), plain_layers(sleeper.model):
        try:
            with torch.no_grad():
                sleeper.backbone(**inputs, **{sleeper.cache_names[1]: cache})
        except (AttributeError, TypeError, ValueError) as error:
            raise NotImplementedError(
                f"`{name}` does not take transformers' `DynamicCache` ({str(error).splitlines()[0]}), so sleep cannot "
                "carry its states."
            ) from error
        cache.drop_keys()
        states = {}
        for index in cache.state_layers:
            layer = cache.layers[index]
            for place, state in layer.recurrent_states.items():
                if state is not None:
                    states[index, place] = layer.recurrent_states[place] = state.detach().requires_grad_()
        if not states:
            raise ValueError(f"`{name}` leaves no recurrent state in its cache, so a window cannot be consolidated.")
        positions = torch.arange(kernel, 2 * kernel, device=weight.device)[None]
        sleeper.backbone(**inputs, position_ids=positions, **{sleeper.cache_names[1]: cache})
    behind = [cache.layers[index].recurrent_states[place].sum() for index, place in states]
    if not any(total.requires_grad for total in behind):
        gradients = (None,) * len(states)
    else:
        total = torch.stack([total.float().to(weight.device) for total in behind]).sum()
        gradients = torch.autograd.grad(total, list(states.values()), allow_unused=True)
    lost = [index for (index, _), gradient in zip(states, gradients) if gradient is None]
    if lost:
        raise NotImplementedError(
            f"layer {lost[0]} of `{name}` reads several tokens at once without the state that it left before, or its "
            "kernel returns no gradient for it: windows would forget each other, so sleep cannot train it."
        )


def longest_kernel(layers: torch.nn.ModuleList) -> int:
    """Of the short convolutions of a stack; 1 if there is none."""
    kernels = [
        module.kernel_size[0]
        for module in layers.modules()
        if isinstance(module, torch.nn.Conv1d) and module.groups > 1
    ]
    return max(kernels, default=1)


def state_layers(model) -> list[int]:
    """Which layers hold a recurrent state."""
    layers = SleepCache(unwrap(model).config).layers
    return [index for index, layer in enumerate(layers) if isinstance(layer, LinearAttentionLayer)]


def recurrent_parameters(model) -> list[torch.nn.Parameter]:
    """The parameters of the layers that hold a recurrent state."""
    layers = sleeper_of(unwrap(model)).layers
    return [parameter for index in state_layers(model) for parameter in layers[index].parameters()]

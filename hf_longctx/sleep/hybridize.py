"""`hybridize`, experimental: recurrent layers between the layers of a plain decoder, so that it can sleep.

The new layers are gated delta rules of Qwen3.5 behind a norm, added to the residual stream. Their output starts at
zero, so the decoder computes what it did, to the bit. What is saved then is no vanilla checkpoint: load the decoder,
call `hybridize` again and load the weights.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5RMSNorm

from ..adapters.wrapped import backbone_of
from ..attention.cache_names import CACHE_NAMES, find_cache
from ..attention.deferred import DeferredMask
from ..tiny_check import evaluation_mode, first_ordinary_token


_HEAD_SIZE = 64


class DeltaLayer(GradientCheckpointingLayer):
    """A gated delta rule behind a norm, added to what it gets; its output projection starts at zero.

    Args:
        hidden_size (`int`), layer_index (`int`): its width, and its place in the stack and the cache.
        head_size (`int`): of keys and values.
        eps (`float`): of the norms.
    """

    def __init__(self, hidden_size: int, layer_index: int, head_size: int, eps: float) -> None:
        super().__init__()
        heads = max(hidden_size // head_size, 1)
        config = Qwen3_5TextConfig(
            hidden_size=hidden_size,
            num_hidden_layers=layer_index + 1,
            layer_types=["linear_attention"] * (layer_index + 1),
            linear_num_key_heads=heads,
            linear_num_value_heads=heads,
            linear_key_head_dim=head_size,
            linear_value_head_dim=head_size,
            rms_norm_eps=eps,
        )
        self.input_layernorm = Qwen3_5RMSNorm(hidden_size, eps=eps)
        self.linear_attn = Qwen3_5GatedDeltaNet(config, layer_index)
        # Drawn as usual, a fresh state forgets within tokens.
        torch.nn.init.constant_(self.linear_attn.A_log, -4.0)
        torch.nn.init.zeros_(self.linear_attn.out_proj.weight)
        parameters = inspect.signature(type(self.linear_attn).forward).parameters
        self._cache_name = next(name for name in CACHE_NAMES if name in parameters)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        chunks = {"chunk_size": kwargs["chunk_size"]} if "chunk_size" in kwargs else {}
        found: Any = find_cache(kwargs)
        cache = {self._cache_name: found}
        inputs = self.input_layernorm(hidden_states)
        # A static cache has keys of tokens to come; the attention in front of this layer has put its own in.
        ends = int(found.get_seq_length()) if getattr(found, "is_compileable", False) else None
        real = real_tokens(kwargs.get("attention_mask"), hidden_states, ends)
        if real is not None:  # a state would read padding, which attention does not
            inputs = inputs * real[..., None].to(inputs)
        return hidden_states + self.linear_attn(inputs, **cache, **chunks)


def real_tokens(mask: Any, hidden_states: torch.Tensor, ends: int | None = None) -> torch.Tensor | None:
    """Which of the tokens are no padding, from the mask that attention gets: those that see themselves.

    Args:
        mask (`torch.Tensor`, `BlockMask` or `DeferredMask`, *optional*): as a tensor of shape `(B, K)` or
            `(B, 1, T, K)`.
        hidden_states (`torch.Tensor` of shape `(B, T, H)`): of the last `T` tokens.
        ends (`int`, *optional*): the key behind the last token's; unset: the last.
    """
    if isinstance(mask, DeferredMask):
        mask = mask.padding
    if mask is None:
        return None
    rows, tokens = hidden_states.shape[:2]
    if not isinstance(mask, torch.Tensor):
        places = torch.arange(tokens, device=hidden_states.device)
        row = torch.arange(rows, device=hidden_states.device)[:, None].expand(-1, tokens)
        begins = (mask.seq_lengths[1] if ends is None else ends) - tokens
        return mask.mask_mod(row, torch.zeros_like(row), places[None], places[None] + begins)
    begins = (mask.shape[-1] if ends is None else ends) - tokens
    if mask.dim() == 2:
        return mask[:, begins : begins + tokens] != 0
    oneself = mask.diagonal(begins, -2, -1)[:, 0]
    return oneself if oneself.dtype == torch.bool else oneself > torch.finfo(oneself.dtype).min / 2


def hybridize(model: PreTrainedModel, every: int = 2, head_size: int = _HEAD_SIZE) -> PreTrainedModel:
    """Put a recurrent layer behind every `every` layers of a plain decoder, in place. Experimental.

    Args:
        model (`PreTrainedModel`): a causal language model without recurrent layers, such as Llama; changed in place.
        every (`int`, *optional*, defaults to 2): layers of the decoder for one that is added.
        head_size (`int`, *optional*, defaults to 64): of the states' keys and values.

    Returns:
        `PreTrainedModel`: the same model, whose logits are what they were, to the bit.

    Raises:
        ValueError: `every` is no number of layers of it, or `head_size` none of keys.
        NotImplementedError: its layers cannot be taken apart; it is as it was then.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`{type(model).__name__}` is no model of transformers: hybridize it before it is wrapped.")
    if not isinstance(head_size, int) or isinstance(head_size, bool) or head_size < 1:
        raise ValueError(f"`head_size` ({head_size!r}) must be a number of keys of a state, 1 or more.")
    backbone = backbone_of(model)
    name, layers, config = type(model).__name__, getattr(backbone, "layers", None), model.config
    if not isinstance(every, int) or isinstance(every, bool) or not 1 <= every <= config.num_hidden_layers:
        raise ValueError(f"`every` ({every!r}) must be 1 up to the {config.num_hidden_layers} layers of `{name}`.")
    kinds = getattr(config, "layer_types", None)
    attentions: list[Any] = [getattr(layer, "self_attn", None) for layer in layers or ()]
    indexed = all(isinstance(getattr(attention, "layer_idx", None), int) for attention in attentions)
    if not isinstance(layers, torch.nn.ModuleList) or not indexed or set(kinds or ()) - {"full_attention"}:
        raise NotImplementedError(
            f"`{name}` is no plain stack of attention layers that know their place (`layers[i].self_attn.layer_idx`), "
            "so recurrent layers cannot be put between them: take a decoder such as Llama."
        )
    before, saved = _logits(model), (layers, config.num_hidden_layers, kinds)
    stack, types = _stack(model, layers, every, head_size)
    backbone.layers, config.num_hidden_layers, config.layer_types = torch.nn.ModuleList(stack), len(stack), types
    try:
        same = torch.equal(_logits(model), before)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        same = False
    if not same:
        backbone.layers, config.num_hidden_layers, config.layer_types = saved
        for index, attention in enumerate(attentions):
            attention.layer_idx = index
        raise NotImplementedError(
            f"`{name}` runs another forward with recurrent layers between its own (it chooses masks by "
            "`layer_types`), so it was left as it was: take a decoder such as Llama."
        )
    return model


def _stack(model: PreTrainedModel, layers, every: int, head_size: int) -> tuple[list[torch.nn.Module], list[str]]:
    """All layers in their new order, those of the decoder with their new place in the cache, and their types."""
    stack: list[torch.nn.Module] = []
    types: list[str] = []
    eps = getattr(model.config, "rms_norm_eps", 1e-6)
    for number, layer in enumerate(layers, start=1):
        layer.self_attn.layer_idx = len(stack)
        stack.append(layer)
        types.append("full_attention")
        if number % every == 0:
            weight = next(layer.parameters())
            added = DeltaLayer(model.config.hidden_size, len(stack), head_size, eps)
            stack.append(added.to(weight).train(layer.training))
            types.append("linear_attention")
    return stack, types


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    tokens = first_ordinary_token(weight.shape[0]) + torch.arange(4, device=weight.device)[None] % weight.shape[0]
    with evaluation_mode(model):
        return copy.copy(model(input_ids=tokens % weight.shape[0], use_cache=True).logits)

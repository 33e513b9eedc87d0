"""How much arithmetic a training step is, from a configuration and the lengths of its documents.

Model FLOPs are what the model's formula asks for: two for each multiplication with a weight or between a query and a
key that it may see, forward, and twice that backward. Work that is done again (checkpointing, MLPs in tiles)
is not in them; hardware FLOPs add it. Shapes are read from the model itself, built without memory for its weights, so
grouped queries, latent attention, experts, gated or plain MLPs and tied heads need no formula each.

Not counted, and small: norms, rotary positions, softmax, activation functions, adapters' own products.
Price: building the model without weights, a fraction of a second; arithmetic after that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters.dense_mlps import find_dense_mlps
from ..families import EXPERTS_PER_TOKEN, TOKEN_LAYERS


RECOMPUTATIONS = ("none", "mlp", "layers")
# Kinds of layers with a convolution over a few tokens in the place of attention.
_CONVOLUTIONS = ("conv",)


@dataclass(frozen=True)
class AttentionSpan:
    """Which keys of its document a token sees.

    Args:
        causal (`bool`): itself and what is before it, or both sides.
        window (`int`, *optional*): causal, the keys it sees at most; otherwise how far it sees to each side.
        chunk (`int`, *optional*): it sees its own chunk of this many tokens only.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None

    def count_pairs(self, lengths: torch.Tensor) -> torch.Tensor:
        """Pairs of a query and a key that it sees, for documents of these `lengths` (integers of any shape)."""
        if self.chunk is not None:
            whole, rest = lengths // self.chunk, lengths % self.chunk
            return whole * self._pairs_within(torch.full_like(lengths, self.chunk)) + self._pairs_within(rest)
        return self._pairs_within(lengths)

    def _pairs_within(self, lengths: torch.Tensor) -> torch.Tensor:
        if self.causal:
            ramp = lengths if self.window is None else lengths.clamp(max=self.window)
            return ramp * (ramp + 1) // 2 + (lengths - ramp) * ramp
        others = (lengths - 1).clamp(min=0)
        ramp = others if self.window is None else others.clamp(max=self.window)
        return lengths + 2 * (ramp * (ramp + 1) // 2 + (others - ramp) * ramp)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step.

    Args:
        forward (`int`): one forward.
        backward (`int`): gradients of activations, and of the weights that learn.
        recomputed (`int`): what is run again to save memory.
    """

    forward: int
    backward: int
    recomputed: int = 0

    @property
    def model(self) -> int:
        """What utilisation is measured with: without what is run again."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What the device computes."""
        return self.model + self.recomputed


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one forward for every token and for every pair of a query and a key.

    Args:
        mlp_per_token (`int`): the dense MLPs, those that can run in tiles.
        layers_per_token (`int`): everything in the layers, MLPs and active experts included, attention's pairs not.
        rest_per_token (`int`): the head, and whatever else stands outside the layers.
        attention (`tuple`): spans, with the FLOPs of one pair summed over all layers of that span.
    """

    mlp_per_token: int
    layers_per_token: int
    rest_per_token: int
    attention: tuple[tuple[AttentionSpan, int], ...]

    def count_pairs(self, lengths: torch.Tensor) -> list[torch.Tensor]:
        """Pairs for every span, summed over documents; no synchronization with a device."""
        return [span.count_pairs(lengths).sum() for span, _ in self.attention]

    def step(
        self,
        lengths: Sequence[int],
        *,
        recompute: str = "none",
        trained_share: float = 1.0,
        count_masked: bool = False,
    ) -> StepFlops:
        """FLOPs of a step over documents of these lengths, on all devices together.

        Args:
            lengths (`Sequence[int]`): tokens of every document of the step; a row that packs none is one document.
            recompute (`str`, *optional*, defaults to `"none"`): see [`step_of_counts`].
            trained_share (`float`, *optional*, defaults to 1.0): see [`step_of_counts`].
            count_masked (`bool`, *optional*, defaults to `False`): count every pair of a document, seen or not, as
                torch's counter does for a causal kernel.
        """
        documents = torch.as_tensor(lengths, dtype=torch.int64)
        square = AttentionSpan(causal=False)
        spans = [square if count_masked else span for span, _ in self.attention]
        pairs = [int(span.count_pairs(documents).sum()) for span in spans]
        return self.step_of_counts(int(documents.sum()), pairs, recompute=recompute, trained_share=trained_share)

    def step_of_counts(
        self, num_tokens: int, pairs: Sequence[int], *, recompute: str = "none", trained_share: float = 1.0
    ) -> StepFlops:
        """FLOPs of a step of so many tokens, and pairs for every span.

        Args:
            num_tokens (`int`): tokens that are not padding.
            pairs (`Sequence[int]`): one entry for each of `attention`.
            recompute (`str`, *optional*, defaults to `"none"`): `"mlp"`, MLPs in tiles; `"layers"`, activation
                checkpointing of all layers, with tiled MLPs or not. Torch may stop short of a layer's last product.
            trained_share (`float`, *optional*, defaults to 1.0): how many of the weights learn; frozen ones pass
                gradients on but need none themselves. About 0 for LoRA.

        Raises:
            ValueError: `recompute` is unknown or `trained_share` no share.
        """
        if recompute not in RECOMPUTATIONS:
            raise ValueError(f"`recompute` ({recompute!r}) must be one of {', '.join(map(repr, RECOMPUTATIONS))}.")
        if not 0 <= trained_share <= 1:
            raise ValueError(
                f"`trained_share` ({trained_share!r}) must lie between 0, all weights frozen, and 1, all trained."
            )
        attention = sum(count * each for count, (_, each) in zip(pairs, self.attention, strict=True))
        products = num_tokens * (self.layers_per_token + self.rest_per_token)
        again = {
            "none": 0,
            "mlp": num_tokens * self.mlp_per_token,
            "layers": num_tokens * self.layers_per_token + attention,
        }
        backward = products + round(products * trained_share) + 2 * attention
        return StepFlops(products + attention, backward, again[recompute])


def count_flops(config: PreTrainedConfig, model_class: type | None = None) -> ModelFlops:
    """Count what one token and one pair cost in a model of this configuration.

    Args:
        config (`PreTrainedConfig`): a transformers configuration; of a multimodal model, the text part counts.
        model_class (`type`, *optional*): the model's class; by default the one that transformers has for language
            modelling.

    Raises:
        NotImplementedError: the model has layers whose cost is not a sum over tokens and pairs, or that this does not
            know; the message names them.
    """
    if getattr(config, "ttt", None) is not None:
        raise NotImplementedError(
            f"`{type(config).__name__}` takes inner steps, whose gradients and their second derivatives are not a sum "
            "over tokens and pairs: its FLOPs are not known."
        )
    config = copy.deepcopy(config.get_text_config())
    config._attn_implementation = "eager"  # the only one that never needs an installed kernel
    model = _build_without_weights(config, model_class)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    attention: dict[AttentionSpan, int] = {}
    for span, per_pair in _attention(config, model, layers):
        attention[span] = attention.get(span, 0) + per_pair
    everything = count_products(model, config)
    in_layers = sum(count_products(layer, config) for layer in layers)
    mlps = sum(count_products(mlp, config) for mlp in find_dense_mlps(model)[0].values())
    return ModelFlops(mlps, in_layers, everything - in_layers, tuple(attention.items()))


def count_products(model: torch.nn.Module, config: PreTrainedConfig, trained_only: bool = False) -> int:
    """FLOPs of a token's products with the weights of `model`; with `trained_only`, the weights that learn."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        weights = {key: p for key, p in module._parameters.items() if p is not None and p.dim() > 1}
        stacked = any(p.dim() == 3 for p in weights.values())
        for key, weight in weights.items():
            if trained_only and not weight.requires_grad:
                continue
            if isinstance(module, torch.nn.Conv1d):  # a token's output reads every weight once
                total += 2 * weight.numel()
                continue
            if weight.dim() > 3 or (weight.dim() == 3 and "expert" not in f"{name}.{type(module).__name__}".lower()):
                raise NotImplementedError(
                    f"`{name}.{key}` of shape {tuple(weight.shape)} is neither a linear layer nor a stack of experts, "
                    "so its FLOPs are not known: count them by hand."
                )
            if weight.dim() == 3:
                total += 2 * weight.numel() // weight.shape[0] * _experts_of_a_token(config)
            elif not stacked:  # next to a stack, a matrix is its biases
                total += 2 * weight.numel()
    return total


def _build_without_weights(config: PreTrainedConfig, model_class: type | None) -> torch.nn.Module:
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"`{type(config).__name__}` is an encoder-decoder, whose two sequences differ in length: FLOPs are "
            "counted for decoders and encoders only."
        )
    if model_class is None or getattr(model_class, "config_class", None) is not type(config):
        mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
        model_class = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    if model_class is None:
        raise NotImplementedError(
            f"transformers has no language model for `{type(config).__name__}`: pass `model_class` to count FLOPs."
        )
    with torch.device("meta"):
        return model_class(config)


def _attention(config: PreTrainedConfig, model: torch.nn.Module, layers: list[torch.nn.Module]):
    """The span of every attention module, with the FLOPs of one pair: a product of scores and one with the values."""
    modules = [module for layer in layers for module in layer.modules() if hasattr(module, "is_causal")]
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kinds = kinds or [None] * (getattr(config, "num_hidden_layers", None) or 0)
    kinds = [kind for kind in kinds if kind not in (*TOKEN_LAYERS, *_CONVOLUTIONS)]
    if len(modules) != len(kinds):
        raise NotImplementedError(
            f"`{type(model).__name__}` has {len(modules)} attention modules in {len(kinds)} layers, so some layers "
            "are not attention or run several times: their FLOPs are not known; count them by hand."
        )
    for module, kind in zip(modules, kinds):
        heads = getattr(module, "num_heads", None) or config.num_attention_heads
        size = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        scores = getattr(module, "qk_head_dim", None) or size
        values = getattr(module, "v_head_dim", None) or size
        yield _span(config, kind, module.is_causal), 2 * heads * (scores + values)


def _span(config: PreTrainedConfig, kind: str | None, causal: bool) -> AttentionSpan:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kind == "chunked_attention":
        return AttentionSpan(causal, chunk=config.attention_chunk_size)
    if kind in (None, "sliding_attention"):  # without layer types, a window is every layer's
        return AttentionSpan(causal, window=window)
    if kind in ("full_attention", "attention"):
        return AttentionSpan(causal)
    raise NotImplementedError(
        f"`{type(config).__name__}` has layers of type '{kind}', whose FLOPs are not a sum over pairs of tokens that "
        "see each other: count them by hand."
    )


def _experts_of_a_token(config: PreTrainedConfig) -> int:
    for name in EXPERTS_PER_TOKEN:
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise NotImplementedError(
        f"`{type(config).__name__}` has experts but says in none of {', '.join(EXPERTS_PER_TOKEN)} how many a token "
        "goes through: count its FLOPs by hand."
    )

"""The parts of the base model, found by name; what of them sees no fast weights runs here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..attention.cache_names import cache_argument
from ..config.test_time import TTTConfig
from ..families import expects_unshifted_labels
from .prime_blocks import attend, own_window
from .window_masks import row_facts, window_mask


_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class BaseParts:
    """Embedding, layers, norm, rotation and head of a base model, and which of its layers are the suffix."""

    decoder: Any
    embedding: torch.nn.Module
    layers: list[Any]
    norm: torch.nn.Module
    rotary: torch.nn.Module
    head: torch.nn.Module
    config: Any
    suffix_layers: int
    window: int

    @property
    def prefix(self) -> list[Any]:
        return self.layers[: len(self.layers) - self.suffix_layers]

    @property
    def suffix(self) -> list[Any]:
        return self.layers[len(self.layers) - self.suffix_layers :]

    def rotation(self, hidden_states: torch.Tensor, begin: int) -> tuple[Any, torch.Tensor]:
        """Cos and sin of positions from `begin` on, and the positions, `(1, t)`."""
        end = begin + hidden_states.shape[1]
        positions = torch.arange(begin, end, device=hidden_states.device)[None]
        return self.rotary(hidden_states, position_ids=positions), positions

    def run_prefix(
        self, input_ids: torch.Tensor, windows: Sequence[Any] | None, begin: int = 0, recomputes: bool = False
    ) -> torch.Tensor:
        """All that sees no fast weights: up to the attention of the first suffix layer, its residual included.

        Args:
            input_ids (`torch.Tensor` of shape `(B, t)`): whole rows, or what comes after `windows`.
            windows (`list`, *optional*): caches of these layers, the first suffix layer among them.
            begin (`int`): tokens before the first.
            recomputes (`bool`): whether that attention is run again in backward; layers decide it for themselves.
        """
        hidden_states = self.embedding(input_ids)
        attends = self._attends(hidden_states, windows is None, begin)
        for index, layer in enumerate(self.prefix):
            keeps = {} if windows is None else {cache_argument(type(layer).forward): windows[index]}
            with nullcontext() if windows is None else _not_recomputed(layer):
                hidden_states = layer(hidden_states, **attends, **keeps, **self._own_window(layer))
            if isinstance(hidden_states, tuple):
                hidden_states = hidden_states[0]
        first, carried = self.suffix[0], None if windows is None else windows[len(self.prefix)]
        attends |= self._own_window(first)
        if recomputes:
            return checkpoint(attend, first, hidden_states, attends, carried, use_reentrant=False)
        return attend(first, hidden_states, attends, carried)

    def _attends(self, hidden_states: torch.Tensor, is_whole: bool, begin: int) -> dict[str, Any]:
        rotary, positions = self.rotation(hidden_states, begin)
        name, carried = self.config._attn_implementation, 0 if is_whole else min(begin, self.window - 1)
        facts = row_facts(name, hidden_states) if is_whole else {}
        return {
            "attention_mask": window_mask(name, self.config, hidden_states, self.window, carried),
            "position_ids": positions,
            "position_embeddings": rotary,
            **facts,
        }

    def _own_window(self, layer: Any) -> dict[str, int]:
        return own_window(layer, self.window) if self.config._attn_implementation.startswith("flash") else {}


@contextmanager
def _not_recomputed(layer: Any) -> Iterator[None]:
    """Before 5.24, transformers takes the cache from a layer that is recomputed, even where nothing is trained."""
    recomputes = getattr(layer, "gradient_checkpointing", False)
    try:
        layer.gradient_checkpointing = False
        yield
    finally:
        layer.gradient_checkpointing = recomputes


def find_decoder(base: Any) -> Any:
    """The part of a base model that is laid out as Llama's.

    Raises:
        NotImplementedError: there is none, it reads more than text, or its loss is not that of the next token.
    """
    name = type(base).__name__
    validate_next_token(base)
    if base.config.get_text_config() is not base.config:
        raise NotImplementedError(
            f"`{type(base).__name__}` reads more than text (its `{type(base.config).__name__}` holds that of a text "
            "model), and inner steps learn from tokens alone: take its language model as base."
        )
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else getattr(base, "model", None)
    for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if getattr(decoder, part, None) is None:
            raise NotImplementedError(
                f"`{name}` has no `{part}` in its decoder (`{type(decoder).__name__}`), and fast weights are added to "
                "models that are laid out as Llama is: take a Llama-like base model."
            )
    return decoder


def find_parts(base: Any, settings: TTTConfig) -> BaseParts:
    """Find the parts of a base model.

    Raises:
        NotImplementedError: it is not laid out as Llama is, or its loss is not that of the next token.
    """
    decoder = find_decoder(base)
    assert settings.suffix_layers is not None and settings.window is not None
    rope = getattr(decoder.rotary_emb, "rope_type", "default")
    if isinstance(rope, str) and rope in _LENGTH_DEPENDENT:
        raise NotImplementedError(
            f"`{type(base).__name__}` rotates by the length of a row (`rope_type` {rope!r}), which no chunk knows: "
            "set another `rope_type`, such as 'default' or 'yarn'; attention sees a window only."
        )
    rotary: Any = type(decoder.rotary_emb)
    if _takes_layer_type(rotary):
        raise NotImplementedError(
            f"`{type(base).__name__}` rotates each kind of layer in its own way (`rotary_emb` takes a `layer_type`), "
            "and chunks know one rotation: take a Llama-like base model."
        )
    if getattr(base.config, "output_router_logits", False):
        raise NotImplementedError(
            f"`{type(base).__name__}` adds a loss of its routers (`output_router_logits=True`), which a forward in "
            "chunks does not have: set `output_router_logits=False` in the base's configuration."
        )
    layers, head = list(decoder.layers), base.get_output_embeddings()
    if settings.suffix_layers >= len(layers):
        raise NotImplementedError(
            f"`suffix_layers` ({settings.suffix_layers}) must be below the {len(layers)} layers that "
            f"`{type(base).__name__}` runs, whatever its configuration counts: the layers before read whole rows at "
            "once."
        )
    return BaseParts(
        decoder,
        decoder.embed_tokens,
        layers,
        decoder.norm,
        decoder.rotary_emb,
        head,
        base.config,
        settings.suffix_layers,
        settings.window,
    )


@functools.cache  # every forward finds the parts anew
def _takes_layer_type(rotary: Any) -> bool:
    return "layer_type" in inspect.signature(rotary.forward).parameters


def validate_next_token(base: Any) -> None:
    """Raise `NotImplementedError` for a model whose loss is not that of the next token."""
    loss = getattr(base, "loss_type", None)
    shifts = loss not in LOSS_MAPPING or LOSS_MAPPING[loss] is ForCausalLMLoss
    is_causal = type(base.config) in AutoModelForCausalLM._model_mapping
    if not (shifts and is_causal) or expects_unshifted_labels(base.config):
        raise NotImplementedError(
            f"`{type(base).__name__}` is not trained on the next token, and the inner loss is that of the next token "
            "read: take a causal language model as base."
        )

"""The parts of the base model: found by name, and compared with its own forward before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..attention.cache_names import cache_argument
from ..config.test_time import TTTConfig
from ..families import expects_unshifted_labels
from ..tiny_check import random_tokens
from .prime_blocks import compare_with_own, own_window, run_layer, validate_parts
from .window_masks import row_facts, window_mask


_TOKENS = 5
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class BaseParts:
    """Embedding, layers, norm, rotation and head of a base model, and which of its layers are the suffix."""

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

    def run_prefix(self, input_ids: torch.Tensor, windows: list[Any] | None, begin: int = 0) -> torch.Tensor:
        """The layers before the suffix on `(B, t)` tokens: whole rows, or what comes after `windows`."""
        hidden_states = self.embedding(input_ids)
        rotary, positions = self.rotation(hidden_states, begin)
        name = self.config._attn_implementation
        carried = 0 if windows is None else min(begin, self.window - 1)
        attends = {
            "attention_mask": window_mask(name, self.config, hidden_states, self.window, carried),
            "position_ids": positions,
            "position_embeddings": rotary,
        }
        whole = row_facts(name, hidden_states) if windows is None else {}
        for index, layer in enumerate(self.prefix):
            keeps = {} if windows is None else {cache_argument(type(layer).forward): windows[index]}
            extra = own_window(layer, self.window) if name.startswith("flash") else {}
            hidden_states = layer(hidden_states, **attends, **keeps, **whole, **extra)
            if isinstance(hidden_states, tuple):
                hidden_states = hidden_states[0]
        return hidden_states


def find_decoder(base: Any) -> Any:
    """The part of a base model that is laid out as Llama's.

    Raises:
        NotImplementedError: there is none, or its loss is not that of the next token.
    """
    name = type(base).__name__
    validate_next_token(base)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else getattr(base, "model", None)
    for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(decoder, part):
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
    layers, head = list(decoder.layers), base.get_output_embeddings()
    return BaseParts(
        decoder.embed_tokens,
        layers,
        decoder.norm,
        decoder.rotary_emb,
        head,
        base.config,
        settings.suffix_layers,
        settings.window,
    )


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


def validate_suffix(parts: BaseParts) -> None:
    """Raise `NotImplementedError` for a suffix layer that lacks parts, or has some without a second gradient."""
    for offset, layer in enumerate(parts.suffix):
        validate_parts(layer, f"layers.{len(parts.prefix) + offset}")


@torch.no_grad()
def compare_parts(base: Any, parts: BaseParts) -> None:
    """Raise `NotImplementedError` unless every suffix layer, and the whole, is what the base model computes.

    The whole is compared on as many tokens as the window sees, under plain attention.
    """
    was_training = base.training
    base.eval()
    try:
        device = parts.embedding.weight.device
        ids = random_tokens(parts.config.vocab_size, 1, min(_TOKENS, parts.window)).to(device)
        hidden_states = parts.run_prefix(ids, None)
        rotary, positions = parts.rotation(hidden_states, 0)
        for offset, layer in enumerate(parts.suffix):
            compare_with_own(layer, f"layers.{len(parts.prefix) + offset}", hidden_states, rotary, parts.window)
        config = parts.suffix[0].self_attn.config
        mask = window_mask(config._attn_implementation, config, hidden_states, parts.window, 0, skip=False)
        attends = {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}
        for layer in parts.suffix:
            hidden_states = run_layer(layer, hidden_states, attends, None, None)
        _compare_whole(base, parts, ids, parts.head(parts.norm(hidden_states)))
    finally:
        base.train(was_training)


def _compare_whole(base: Any, parts: BaseParts, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """What surrounds the layers: scaled embeddings, capped logits and the like would be lost."""
    names = [(module, module.config) for module in (layer.self_attn for layer in parts.suffix)]
    try:
        for module, _ in names:
            module.config = parts.config
        expected = base(input_ids=ids, use_cache=False).logits
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise NotImplementedError(
            f"`{type(base).__name__}` does not run on a few tokens ({type(error).__name__}: {reason}), so its parts "
            "cannot be compared with it."
        ) from error
    finally:
        for module, config in names:
            module.config = config
    # In float64, too: transformers' softmax and norms cast to float32 inside.
    allowed = {torch.float32: 1e-4, torch.float64: 1e-6}.get(logits.dtype, 5e-2)
    off = (expected - logits).abs().max() / expected.abs().max().clamp(min=1e-12)
    if not bool(off <= allowed):
        raise NotImplementedError(
            f"`{type(base).__name__}` computes more than embedding, layers, norm and head: its logits differ from "
            f"theirs by {float(off):.1e} of the largest, so chunks would be another model; take a Llama-like base "
            "model."
        )

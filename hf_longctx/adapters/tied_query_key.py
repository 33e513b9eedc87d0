"""Shared queries and keys: the key projection of every attention layer has the parameters of the query projection.

What: LSH attention puts a query into the bucket of its keys, so both are the same vectors, as in the Reformer paper.
The layer computes both as before; a checkpoint has both under their own names, equal, and any library loads it.

Price: nothing while training; a copy of the key projections while a checkpoint is written.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..attention.lsh_models import are_equal, are_shared, query_key_modules
from ..attention.registry import find_attention
from .rebind import called_names
from .wrapped import unwrap


_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def tie_query_key(model: torch.nn.Module) -> None:
    """Let every attention layer of a new model make its keys as it makes its queries.

    Keys that were trained apart are lost: this is for training from scratch, or for a model that was trained so. After
    `from_pretrained` trainers and `adapt` tie such a model again; a loop without them calls this.

    Args:
        model (`torch.nn.Module`): changed in place, on this instance only; before DDP, FSDP2 and the optimizer.

    Raises:
        ValueError: it is no model of transformers, or has no attention layers on transformers' interface.
        NotImplementedError: a layer makes fewer keys than queries, or both with one matrix.
    """
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"`{type(inner).__name__}` is not a model of transformers, whose attention layers could be tied: pass the "
            "model that has them."
        )
    layers = attention_layers(inner)
    if not layers:
        raise ValueError(
            f"`{type(inner).__name__}` has no attention layer on transformers' interface whose queries and keys could "
            "be tied: choose a model such as Llama, Qwen or GPT-NeoX without shared key/value heads."
        )
    for layer in layers:
        validate_tieable(layer)
    for layer in layers:
        _tie(layer)


def tie_equal_weights(model: torch.nn.Module) -> None:
    """Tie what a checkpoint of a tied model brought as equal weights; anything else stays as it is."""
    for layer in attention_layers(unwrap(model)):
        pairs = query_key_modules(layer).items()
        if all(are_equal(layer.get_submodule(query), layer.get_submodule(key)) for query, key in pairs):
            _tie(layer)


def attention_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a model that run an attention of ours, or would after `set_attn_implementation`."""
    text = model.config.get_text_config()
    found = []
    for layer in model.modules():
        config = getattr(layer, "config", None)
        calls = _INTERFACE in called_names(type(layer).forward)
        if config is not None and (calls or _has_projections(layer)) and not isinstance(layer, PreTrainedModel):
            ours = find_attention(getattr(config, "_attn_implementation", None)) is not None
            found += [layer] if ours or config is text else []
    return found


def validate_tieable(layer: torch.nn.Module) -> None:
    """Refuse a layer whose keys cannot be its queries.

    Raises:
        NotImplementedError: it has fewer key/value heads, or no matrix for queries that is not also that of keys.
    """
    name = type(layer).__name__
    if not _has_projections(layer):
        raise NotImplementedError(
            f"`{name}` has no two matrices of which one makes queries and the other keys, so they cannot be tied for "
            "LSH attention: choose a model with `q_proj` and `k_proj`, such as Llama or Qwen."
        )
    for query, key in query_key_modules(layer).items():
        mine, theirs = (dict(layer.get_submodule(module).named_parameters()) for module in (query, key))
        sizes = [getattr(layer.config, field, None) for field in ("num_key_value_heads", "num_attention_heads")]
        if mine.keys() != theirs.keys():
            odd = sorted(mine.keys() ^ theirs.keys())[0]
            raise NotImplementedError(
                f"`{query}` and `{key}` of `{name}` have different parameters (`{odd}`), so they cannot be tied: give "
                "both the same adapters, such as by `target_modules` of PEFT."
            )
        if any(theirs[part].shape != parameter.shape for part, parameter in mine.items()):
            heads = f" {sizes[0]} key/value heads for {sizes[1]} query heads" if None not in sizes else " fewer keys"
            raise NotImplementedError(
                f"`{name}` has{heads}, so `{key}` cannot be tied to `{query}` for LSH attention: build the model with "
                f"`num_key_value_heads` {sizes[1]}."
            )


def _has_projections(layer: torch.nn.Module) -> bool:
    modules = (layer.get_submodule(name) for name in query_key_modules(layer))
    return any(parameter.dim() > 1 for module in modules for parameter in module.parameters())


def _tie(layer: torch.nn.Module) -> None:
    for query, key in query_key_modules(layer).items():
        mine, theirs = layer.get_submodule(query), layer.get_submodule(key)
        if not are_shared(mine, theirs):
            for name, parameter in mine.named_parameters():
                owner, _, leaf = name.rpartition(".")
                setattr(theirs.get_submodule(owner), leaf, parameter)
    if _write_both not in layer._state_dict_hooks.values():
        layer.register_state_dict_post_hook(_write_both)


def _write_both(layer: torch.nn.Module, state: dict, prefix: str, _: dict) -> None:
    """Give a checkpoint the keys' weights as tensors of their own, which is how it is read."""
    for key in query_key_modules(layer).values():
        for name, _ in layer.get_submodule(key).named_parameters():
            entry = f"{prefix}{key}.{name}"
            if entry in state:
                state[entry] = state[entry].clone()

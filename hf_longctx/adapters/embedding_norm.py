"""A LayerNorm behind the word embedding, for a model that trains from scratch, as BLOOM has one.

What: [`add_embedding_norm`] registers the norm as a child of the embedding, so that it is trained, saved and sharded
with it, and patches the embedding's forward to end with it. Why: with it a large model trains stably on large batches
(BLOOM's chronicle, and Dettmers' stable embedding), at some cost in what it generalizes to.

How it comes back: `config.hf_longctx_embedding_norm` says that the weights belong to a model with the norm.
transformers builds the class without it and leaves the norm's weights in the file; [`follow_embedding_norm`], which
`adapt` and the trainers call, reads them from there. Price: one LayerNorm a token.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .instance_forward import InstancePatch, PatchHandle, patch_on, put_on
from .wrapped import unwrap


EMBEDDING_NORM = "embedding norm"
ON_EMBEDDING_NORM = "hf_longctx_embedding_norm"
_CHILD = "embedding_norm"
# What models call the epsilon of their norms.
_EPSILONS = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps", "rms_norm_eps")


class EmbeddingNormHandle(PatchHandle):
    """What [`add_embedding_norm`] returns; `remove()` takes the norm off the model, and out of its config."""

    def remove(self) -> None:
        inner = unwrap(self.model)
        embedding = inner.get_input_embeddings()
        super().remove()
        if patch_on(embedding, EMBEDDING_NORM) is None and hasattr(embedding, _CHILD):
            delattr(embedding, _CHILD)
            for config in (inner.config, inner.config.get_text_config()):
                vars(config).pop(ON_EMBEDDING_NORM, None)


class _NormPatch(InstancePatch):
    """A word embedding that ends with its norm."""

    name = EMBEDDING_NORM

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        return getattr(module, _CHILD)(own(*args, **kwargs))


def add_embedding_norm(model: torch.nn.Module) -> EmbeddingNormHandle:
    """Put a LayerNorm behind the word embedding of a model that trains from scratch.

    `save_pretrained` and checkpoints hold its weights, and `hf_longctx_embedding_norm` in the configuration. After
    `from_pretrained` call this again, or `adapt`, or build a trainer: the norm's weights are then read from where the
    model came from. Call it before optimizers and wrappers are made, and again after `resize_token_embeddings`.

    Args:
        model (`torch.nn.Module`): changed in place, on this instance only. `inputs_embeds` that a caller passes are
            taken as they are: as the norm returned them.

    Returns:
        [`EmbeddingNormHandle`]: `remove()` undoes it. A second call changes nothing.

    Raises:
        ValueError: the weights are pretrained, the model has such a norm of its own, or it is no such model.
        NotImplementedError: it has an encoder and a decoder, or no word embedding.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"`{name}` is not a model of transformers, whose word embedding could be found: pass that.")
    embedding = _embedding_of(name, inner)
    if patch_on(embedding, EMBEDDING_NORM) is not None:
        return EmbeddingNormHandle(model, EMBEDDING_NORM)
    known = getattr(inner.config, ON_EMBEDDING_NORM, False)
    weights = None
    if _is_pretrained(inner, embedding):
        if not known:
            raise ValueError(
                f"the weights of `{name}` are pretrained ({_origin(inner)}), and layers that were trained without a "
                "norm behind the embedding know nothing with one: build the model with `from_config`, or leave "
                "`add_embedding_norm` out."
            )
        weights = _saved_weights(inner, _name_of(inner, embedding))
    like = {"device": embedding.weight.device, "dtype": embedding.weight.dtype}
    norm = torch.nn.LayerNorm(embedding.weight.shape[1], eps=_epsilon(inner.config), **like)
    if weights is not None:
        norm.load_state_dict(weights)
    norm.train(embedding.training).requires_grad_(embedding.weight.requires_grad)  # PEFT would train and not save it
    setattr(embedding, _CHILD, norm)
    put_on(embedding, _NormPatch())
    if not known:
        _mark_own_config(inner)
    return EmbeddingNormHandle(model, EMBEDDING_NORM)


def follow_embedding_norm(model: torch.nn.Module) -> PatchHandle:
    """Put the norm on a model that was saved with one; the handle is empty, since weights stay when adapters go."""
    inner = unwrap(model)
    if getattr(getattr(inner, "config", None), ON_EMBEDDING_NORM, False):
        add_embedding_norm(model)
    return PatchHandle(model)


def _embedding_of(name: str, model: PreTrainedModel) -> torch.nn.Module:
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"`{name}` has an encoder and a decoder, which share their word embedding in ways of their own: train a "
            "decoder or an encoder alone, or leave `add_embedding_norm` out."
        )
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if type(embedding).__module__.startswith("peft."):
        raise NotImplementedError(
            f"PEFT has a `{type(embedding).__name__}` in place of the word embedding of `{name}`, and adds behind the "
            "norm what a merge would add before it: leave the embedding out of `target_modules`, `modules_to_save` "
            "and `trainable_token_indices`."
        )
    if not isinstance(embedding, torch.nn.Embedding) or weight is None or weight.dim() != 2:
        raise NotImplementedError(
            f"`{name}` has no `torch.nn.Embedding` of words (`get_input_embeddings()` is a "
            f"`{type(embedding).__name__}`), behind which a norm could stand: choose another model."
        )
    for child, module in model.named_modules():
        if child.rpartition(".")[2] == "word_embeddings_layernorm":  # BLOOM
            raise ValueError(
                f"`{name}` has a norm behind its embedding already (`{child}`, a `{type(module).__name__}`): leave "
                "`add_embedding_norm` out."
            )
    return embedding


def _is_pretrained(model: PreTrainedModel, embedding: torch.nn.Module) -> bool:
    """Whether the weights were trained before: `from_pretrained` leaves its marks, and `load_state_dict` the numbers.

    Norms of a new model hold one number each, ones or zeros, and no training leaves them so.
    """
    if "_weight_conversions" in vars(model) or getattr(embedding.weight, "_is_hf_initialized", False):
        return True
    for module in model.modules():
        weight = vars(module).get("_parameters", {}).get("weight")
        if "norm" not in type(module).__name__.lower() or weight is None or weight.dim() != 1 or weight.is_meta:
            continue
        local = weight.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        if local.numel() and not bool((local == local[0]).all()):
            return True
    return False


def _origin(model: PreTrainedModel) -> str:
    return f"`{model.name_or_path}`" if model.name_or_path else "by `load_state_dict`, or by training"


def _name_of(model: torch.nn.Module, embedding: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is embedding)


def _epsilon(config) -> float:
    text = config.get_text_config()
    return next((float(value) for name in _EPSILONS if (value := getattr(text, name, None))), 1e-5)


def _mark_own_config(model: PreTrainedModel) -> None:
    """Write the mark into a configuration of the instance's own: models built from one object share it.

    A model of several modalities has a configuration for each, which its parts hold. The one of words is marked, too:
    it is what a model of words alone would be built from.
    """
    copies: dict[int, Any] = {}
    own = copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])
    for config in {id(each): each for each in (own, own.get_text_config())}.values():
        setattr(config, ON_EMBEDDING_NORM, True)


def _saved_weights(model: PreTrainedModel, embedding: str) -> dict[str, torch.Tensor]:
    """Weight and bias of the norm, from the files that the model was loaded from."""
    # Models of a part, or of more, have other names in front of the embedding's own.
    source, own = model.name_or_path, embedding.rpartition(".")[2]
    wanted = tuple(f"{own}.{_CHILD}.{name}" for name in ("weight", "bias"))
    if not source:
        raise ValueError(
            f"`{type(model).__name__}` was trained with a norm behind its embedding (`config.{ON_EMBEDDING_NORM}`), "
            "and its weights were loaded before it had one: call `add_embedding_norm` before `load_state_dict`."
        )
    found = {}
    for file in _weight_files(source):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                for name in wanted:
                    if key == name or key.endswith("." + name):
                        found[name.rpartition(".")[2]] = tensors.get_tensor(key)
    if len(found) < len(wanted):
        raise ValueError(
            f"`{type(model).__name__}` was trained with a norm behind its embedding (`config.{ON_EMBEDDING_NORM}`), "
            f"but `{source}` has no `{embedding}.{_CHILD}.weight` in safetensors: save the model with "
            "`save_pretrained` or a trainer."
        )
    return found


def _weight_files(source: str) -> list[str]:
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        return [file for name in names if (file := cached_file(source, name, **options)) is not None]
    single = cached_file(source, SAFE_WEIGHTS_NAME, **options)
    return [] if single is None else [single]

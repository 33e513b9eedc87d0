"""What cannot be embedded without padding, or on several processes, refused before the first step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import CNN, LSTM, WordWeights
from transformers.utils.generic import is_flash_attention_requested

from ..adapters.peft_kinds import check_peft
from ..adapters.recurrent.layers import is_followed
from ..attention.kernels import validate_kernel_available
from ..attention.registry import name_that_packs, name_that_shards, packs_rows, shards_rows
from ..families import query_heads
from ..parallel.heads import validate_head_count


def check_packable(model: object) -> list[Transformer]:
    """The transformers of a sentence-transformer that can run without padding, or the reason why it cannot."""
    if not isinstance(model, SentenceTransformer):
        raise TypeError(
            f"`model` is a `{type(model).__name__}`, but packing is for a `SentenceTransformer`: load it with "
            f"`SentenceTransformer(name, model_kwargs={{'attn_implementation': {name_that_packs()!r}}})`."
        )
    inner = [model[0], *model[0].modules()] if isinstance(model[0], Router) else [model[0]]
    transformers = [module for module in inner if isinstance(module, Transformer)]
    if not transformers:
        raise NotImplementedError(
            f"`model[0]` is a `{type(model[0]).__name__}`, which runs no transformers model, so there is no padding "
            "to remove: train it with sentence-transformers' own trainer."
        )
    for module in transformers:
        _check_transformer(module)
    for route, modules in pipelines(model).items():
        _check_pipeline(route, modules)
    return transformers


def pipelines(model: SentenceTransformer) -> dict[str, list[torch.nn.Module]]:
    """The modules that a text may go through, in order, by the routes of the `Router`s on the way (`""` for none)."""
    return {"/".join(dict.fromkeys(path)): modules for path, modules in _paths(model.children(), ())}


def _paths(modules: Iterable[torch.nn.Module], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], list]]:
    """Every way through `modules` for a text that has taken the routes of `path`; it keeps a name where it can."""
    found: list[tuple[tuple[str, ...], list]] = [(path, [])]
    for module in modules:
        if isinstance(module, Router):
            found = [
                (longer, [*passed, *inside])
                for taken, passed in found
                for name in [name for name in module.sub_modules if name in taken] or module.sub_modules
                for longer, inside in _paths(module.sub_modules[name], (*taken, name))
            ]
        else:
            found = [(taken, [*passed, module]) for taken, passed in found]
    return found


def _check_pipeline(route: str, modules: list[torch.nn.Module]) -> None:
    """Refuse what reads rows of tokens behind a transformer, whose texts stand in one row."""
    if not any(isinstance(module, Transformer) for module in modules):
        return
    for module in modules:
        if isinstance(module, (CNN, LSTM, WordWeights)):
            where = f" in route {route!r}" if route else ""
            raise NotImplementedError(
                f"`{type(module).__name__}`{where} reads texts side by side, which packed texts are not: use "
                "`Pooling`, or leave the model padded."
            )


def _check_transformer(module: Transformer) -> None:
    name, attention = type(module.model).__name__, getattr(module.config, "_attn_implementation", None)
    if not packs_rows(attention):
        raise ValueError(
            f"`{name}` runs attn_implementation={attention!r}, which would let the texts of a flat row see each other:"
            f" load the model with `SentenceTransformer(name, model_kwargs={{'attn_implementation': "
            f"{name_that_packs()!r}}})`, or {name_that_shards()!r} for several processes a row."
        )
    check_peft(module.model, "in a row of several texts", "leave the model padded")
    if module.unpad_inputs is False:
        raise ValueError(
            f"`unpad_inputs` is False, so `{name}` was asked to pad: set `model[0].unpad_inputs = None` first, or "
            "leave the model padded."
        )
    methods = {params["method"] for params in module.modality_config.values()}
    if module.transformer_task != "feature-extraction" or "text" not in module.modality_config:
        raise NotImplementedError(
            f"`{name}` is loaded for the task '{module.transformer_task}' with {', '.join(module.modality_config)}: "
            "only text embeddings can be packed; leave the model padded."
        )
    if module.backend != "torch" or methods != {"forward"}:
        raise NotImplementedError(
            f"`{name}` runs on the backend '{module.backend}' through {', '.join(sorted(methods))}: packing needs the "
            "torch model's own `forward`; leave the model padded."
        )
    has_own_layers = any(is_followed(layer) for layer in module.model.modules())  # without attention, as in Mamba
    if not module.model.is_backend_compatible() and not has_own_layers:
        raise NotImplementedError(
            f"`{name}` does not call transformers' attention interface, so no kernel of ours is asked to keep texts "
            "apart: load it with attn_implementation='eager' and leave it padded."
        )


def refuse_leak(module: Transformer) -> None:
    """Raise `ValueError` if a flat row meets a kernel that does not know where texts end."""
    attention = getattr(module.config, "_attn_implementation", None)
    if packs_rows(attention) or is_flash_attention_requested(requested_attention_implementation=attention):
        return
    raise ValueError(
        f"several texts in one row reached attn_implementation={attention!r}, which lets them see each other: call "
        f"`model[0].model.set_attn_implementation({name_that_packs()!r})`, or pad with `model[0].unpad_inputs = "
        "False`."
    )


def check_shardable(model: SentenceTransformer, size: int, inner_attention: str) -> None:
    """Refuse a model whose rows cannot be shared by `size` processes."""
    validate_kernel_available(inner_attention)
    for module in model.modules():
        if isinstance(module, Transformer):
            _check_shared_transformer(module, size)


def _check_shared_transformer(module: Transformer, size: int) -> None:
    name = type(module.model).__name__
    attention = module.config._attn_implementation
    if not shards_rows(attention):
        raise ValueError(
            f"`{name}` runs attn_implementation={attention!r}, which works on whole rows, with "
            f"`sequence_parallel_size` ({size}): load it with `model_kwargs={{'attn_implementation': "
            f"{name_that_shards()!r}}}`."
        )
    heads = query_heads(module.config)
    if heads is not None:
        validate_head_count(heads, size)

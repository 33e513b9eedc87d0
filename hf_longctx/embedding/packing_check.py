"""The proof that a packed or shared model gives every text the embedding it has alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from ..adapters.instance_forward import own_method
from ..tiny_check import OTHER_ROW_LENGTHS, evaluation_mode
from .flat_rows import plain_ids
from .packable import pipelines


_LENGTHS = (7, 2, 12)


def prove_packing(model: SentenceTransformer, name: str, *, shared: bool) -> None:
    """Embed three short rows in one, and each alone as it was before, on every route; raise if they differ.

    Args:
        model (`SentenceTransformer`): packed.
        name (`str`): of the patches that pack it.
        shared (`bool`): whether the ranks of a group share rows.

    Raises:
        NotImplementedError: a text's embedding depends on its neighbours, or its positions are others.

    Communication: with `shared`, that of one forward a route, so every rank of a group must call it.
    """
    if any(p.device.type == "meta" for p in model.parameters()):
        return
    for route, modules in pipelines(model).items():
        transformer = next((module for module in modules if isinstance(module, Transformer)), None)
        if transformer is not None:
            _prove_route(model, route, modules, transformer, name, shared)


def _prove_route(model, route: str, modules: list, module: Transformer, name: str, shared: bool) -> None:
    device = next(module.model.parameters()).device
    texts = _texts(module)
    flat = module.data_collator([{"input_ids": ids} for ids in texts])
    flat["position_ids"] = flat["position_ids"] + module._flatten_position_offset
    flat = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in flat.items()}
    flat["modality"] = "text"
    with evaluation_mode(model), torch.no_grad():
        if route:
            packed = _through(modules, {**flat, "input_ids": plain_ids(flat["input_ids"])})
        else:
            packed = model(flat)["sentence_embedding"]
        alone = torch.cat([_embed_alone(modules, name, ids, device) for ids in texts])
    tolerance = OTHER_ROW_LENGTHS.of(alone.dtype)
    difference = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-30))
    if not difference <= tolerance:
        way = "shared by the ranks of a group" if shared else "packed in one row"
        where = f" on route {route!r}" if route else ""
        raise NotImplementedError(
            f"`{type(module.model).__name__}` embeds texts {way}{where} otherwise than alone (by {difference:.2g} of "
            f"the largest coordinate, {tolerance:.0e} allowed): something in it reads across texts or counts "
            "positions itself; leave it padded, with attn_implementation='sdpa'."
        )


def _through(calls: list[Callable], features: dict[str, object]) -> torch.Tensor:
    for call in calls:
        features = call(features)
    return features["sentence_embedding"]


def _texts(module: Transformer) -> list[list[int]]:
    """Rows of ordinary tokens: a special one may change how a model counts positions."""
    special = set(module.tokenizer.all_special_ids) if module.tokenizer is not None else set()
    size = module.config.get_text_config().vocab_size
    ordinary = [token for token in range(min(size, 1000)) if token not in special]
    draws = iter(range(sum(_LENGTHS)))
    return [[ordinary[(7919 * next(draws) + 31) % len(ordinary)] for _ in range(length)] for length in _LENGTHS]


def _embed_alone(modules: list[torch.nn.Module], name: str, ids: list[int], device: torch.device) -> torch.Tensor:
    """One unpadded text, with a mask and no positions, through the original forwards: the model without patches."""
    features: dict[str, object] = {"input_ids": torch.tensor([ids], device=device), "modality": "text"}
    features["attention_mask"] = torch.ones_like(features["input_ids"])
    return _through([own_method(m, name) if isinstance(m, (Transformer, Pooling)) else m for m in modules], features)

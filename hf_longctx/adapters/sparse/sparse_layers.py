"""The sparse layers of a model and their indexers, whichever adapter looks after them."""

from __future__ import annotations

import torch

from ..instance_forward import patch_on
from .compressed_layers import LAYER as COMPRESSED
from .compressed_layers import is_compressed_layer
from .indexer_objective import IndexerObjective
from .shared_row import LAYER as SHARED
from .shared_row import is_sparse_layer, picks_tokens


def count_sparse_layers(model: torch.nn.Module) -> int:
    """How many layers of a model gather keys or entries of whole rows, and keep all their heads."""
    return sum(is_sparse_layer(module) or is_compressed_layer(module) for module in model.modules())


def keeps_all_heads(model: torch.nn.Module) -> bool:
    """Whether every layer of a model is a sparse one, so that ranks share no heads and any number of them may run."""
    return count_sparse_layers(model) == model.config.get_text_config().num_hidden_layers


def indexers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The indexers whose scores can be trained: of single tokens, or of compressed entries."""
    found = []
    for module in model.modules():
        if is_sparse_layer(module) and (module.indexer is None or picks_tokens(module.indexer)):
            found.append(module.indexer)
        elif is_compressed_layer(module):
            found.append(getattr(module.compressor, "indexer", None))
    return [indexer for indexer in found if indexer is not None]


def untrained_indexers(model: torch.nn.Module, loss: str | None) -> list[str]:
    """The trainable parameters of indexers that get no gradient with this `loss` of an [`IndexerConfig`]."""
    trained = [] if loss is None else indexers_of(model)
    known = {id(parameter) for indexer in trained for parameter in indexer.parameters()}
    layers = [module for module in model.modules() if is_sparse_layer(module) or is_compressed_layer(module)]
    indexers = [
        getattr(part, "indexer", None) for layer in layers for part in (layer, getattr(layer, "compressor", None))
    ]
    mine = {id(p) for indexer in indexers if indexer is not None for p in indexer.parameters() if p.requires_grad}
    return [name for name, parameter in model.named_parameters() if id(parameter) in mine - known]


def first_queries(model: torch.nn.Module) -> list[int]:
    """By kind of layer, the first position in a document at which a query has something to pick from."""
    widths = {
        module.compressor.compress_rate
        for module in model.modules()
        if is_compressed_layer(module) and getattr(module.compressor, "indexer", None) is not None
    }
    return [0, *sorted(width - 1 for width in widths)]


def set_objective(model: torch.nn.Module, objective: IndexerObjective) -> None:
    """Let the patched sparse layers of `model` follow an objective."""
    for module in model.modules():
        for name in (SHARED, COMPRESSED):
            patch = patch_on(module, name)
            if patch is not None:
                patch.objective = objective

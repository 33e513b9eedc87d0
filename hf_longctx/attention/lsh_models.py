"""Models that run LSH attention: what their configuration says, and whether the keys of a layer are its queries."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..config.lsh_settings import LSH_KEY


_OF_QUERY = re.compile(r"(?<![a-z])q(?![a-z])|query")


def is_lsh_model(module: torch.nn.Module) -> bool:
    """Whether the configuration of a layer or model says that it runs LSH attention."""
    return runs_lsh_attention(getattr(module, "config", None))


def runs_lsh_attention(config: Any) -> bool:
    """Whether a configuration, or that of its text part, names LSH attention."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, LSH_KEY, None) is not None


def query_key_modules(layer: torch.nn.Module) -> dict[str, str]:
    """Names of a layer's modules that make queries, each with its sibling for keys: projections, and norms of heads.

    `q_proj` goes with `k_proj`, `query` with `key`, `q_norm` with `k_norm`.
    """
    names = {name for name, _ in layer.named_children()}
    found = {}
    for name in sorted(names):
        sibling = _OF_QUERY.sub(lambda match: "key" if match.group() == "query" else "k", name, count=1)
        if sibling != name and sibling in names:
            found[name] = sibling
    return found


def are_shared(query: torch.nn.Module, key: torch.nn.Module) -> bool:
    """Whether two modules have the very same parameters, under the same names."""
    theirs = dict(key.named_parameters())
    mine = dict(query.named_parameters())
    return mine.keys() == theirs.keys() and all(theirs[name] is parameter for name, parameter in mine.items())


def are_equal(query: torch.nn.Module, key: torch.nn.Module) -> bool:
    """Whether two modules have parameters of the same names, shapes and values."""
    mine, theirs = dict(query.named_parameters()), dict(key.named_parameters())
    return mine.keys() == theirs.keys() and all(
        theirs[name] is parameter or (theirs[name].shape == parameter.shape and _same(parameter, theirs[name]))
        for name, parameter in mine.items()
    )


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return not mine.is_meta and mine.device == theirs.device and torch.equal(mine, theirs)


def has_shared_weights(layer: torch.nn.Module) -> bool:
    """Whether all that makes a layer's keys has the parameters of what makes its queries."""
    pairs = query_key_modules(layer).items()
    return bool(pairs) and all(
        are_shared(layer.get_submodule(query), layer.get_submodule(key)) for query, key in pairs
    )


def refuse_untied_parameters(layer: torch.nn.Module) -> None:
    """Refuse to train a layer whose keys have weights of their own, though they may be equal now.

    Raises:
        ValueError: a step would part them.
    """
    if not torch.is_grad_enabled():
        return
    for query, key in query_key_modules(layer).items():
        mine, theirs = layer.get_submodule(query), layer.get_submodule(key)
        trained = any(p.requires_grad for module in (mine, theirs) for p in module.parameters())
        if trained and not are_shared(mine, theirs):
            raise ValueError(
                f"`{query}` and `{key}` of `{type(layer).__name__}` have weights of their own, but LSH attention "
                "hashes both into the same buckets: call `hf_longctx.tie_query_key(model)` once it is built or loaded."
            )

"""A model run on a few tokens, without a trace: to take its layers apart, and for its loss before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def random_ids(model: torch.nn.Module, rows: int, tokens: int) -> torch.Tensor:
    """The same `rows` of `tokens` at every call, on the device of `model`."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


@contextlib.contextmanager
def own_draws(model: torch.nn.Module) -> Iterator[None]:
    """The user's random generators stay as they are."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def training_mode(model: torch.nn.Module, mode: bool = True) -> Iterator[None]:
    """`model.train(mode)` within the block."""
    before = [(module, module.training) for module in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def loss_batch(model: torch.nn.Module, convert: bool | Mapping[str, Any]) -> dict[str, Any]:
    """The batch in `convert`, or random tokens.

    Raises:
        ValueError: `model` has no head, so no loss.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"`{type(model).__name__}` has no loss that could tell what `convert` changes: convert the model with its "
            "head (`AutoModelForCausalLM`)."
        )
    if isinstance(convert, Mapping):
        if convert.get("labels") is None:
            raise ValueError("`convert` is a batch without `labels`, so its loss cannot be told: add them.")
        return dict(convert)
    ids = random_ids(model, 2, 64)
    return {"input_ids": ids, "labels": ids}


def loss_of(model: torch.nn.Module, batch: dict[str, Any]) -> float:
    """Its loss, without dropout."""
    with training_mode(model, False), torch.no_grad():
        return float(model(**batch).loss)

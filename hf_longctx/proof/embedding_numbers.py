"""Embeddings, the contrastive loss and every gradient of a sentence-transformer, however it lays out its texts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer

from .numbers import Numbers, compare, mean_gradients, mean_of_ranks, relative
from .result import Errors


# Of one process, by the same operations but for a token that no other sees.
_ROUNDING = 1e-6


def embed(model: SentenceTransformer, columns: list[list[str]]) -> torch.Tensor:
    """One embedding a text, `(texts, D)`, in the order of the columns."""
    with torch.no_grad():
        return torch.cat([model(model.preprocess(texts))["sentence_embedding"] for texts in columns])


def train(
    loss: torch.nn.Module, model: SentenceTransformer, columns: list[list[str]], embeddings: torch.Tensor
) -> Numbers:
    """Loss and gradients of one process. `loss.model` may wrap `model`."""
    return _step(loss, model, columns, embeddings, lambda: _own_gradients(model))


def train_on_ranks(
    loss: torch.nn.Module, model: SentenceTransformer, columns: list[list[str]], embeddings: torch.Tensor, wrapper: str
) -> Numbers:
    """Loss and gradients after the mean over all ranks, as an optimizer sees them. Every rank calls this."""
    numbers = _step(loss, model, columns, embeddings, lambda: mean_gradients(model, wrapper))
    loss_of_all, evaluation = mean_of_ranks(numbers.loss), mean_of_ranks(numbers.evaluation)
    return dataclasses.replace(numbers, loss=loss_of_all, evaluation=evaluation)


def _step(loss, model, columns, embeddings, gradients_of) -> Numbers:
    model.zero_grad()
    value = loss([model.preprocess(texts) for texts in columns], None)
    value.backward()
    gradients = gradients_of()
    model.zero_grad()
    loss.model.eval()
    with torch.no_grad():
        evaluation = loss([model.preprocess(texts) for texts in columns], None)
    loss.model.train()
    value = value.detach()
    # Rounding of a cross entropy is that of its scores, which are of the order of 1, however small the loss.
    return Numbers(embeddings, value, evaluation, gradients, scale=max(float(value.abs()), 1.0))


def _own_gradients(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sees_later_tokens(model: SentenceTransformer, word: str, later: str, other: str) -> bool:
    """Whether the vector of the first token of `word` depends on the word behind it."""
    with torch.no_grad():
        features = [model.preprocess([f"{word} {end}"]) for end in (later, other)]
        first, second = (model[0](text)["token_embeddings"][:, 0] for text in features)
    return relative(first, second) > _ROUNDING


def compare_embeddings(ours: Numbers, theirs: Numbers, first_row: int, num_modes: int) -> Errors:
    """Relative differences; `num_modes` embeddings are concatenated in one, and each is held to its own."""
    errors = compare(ours, theirs, first_row)
    expected = theirs.outputs[first_row : first_row + len(ours.outputs)].chunk(num_modes, dim=1)
    of_modes = [relative(actual, part) for actual, part in zip(ours.outputs.chunk(num_modes, dim=1), expected)]
    return dataclasses.replace(errors, logits=float(torch.tensor(of_modes, dtype=torch.float64).max()))


def embeddings_without_communication(
    model: SentenceTransformer, texts: list[str], group: dist.ProcessGroup | None, rank: int, size: int
) -> torch.Tensor:
    """Embeddings by attention that does not know whose tokens a row has: the error that our layout prevents.

    Args:
        model (`SentenceTransformer`): packed, and each process holds its own rows.
        size (`int`): ranks of `group`. With 1, texts are not kept apart; with more, ranks hold a share of the row and
            exchange nothing.
    """
    features = model.preprocess(texts)
    bounds, num_tokens = features["cu_seq_lens_q"].long(), features["input_ids"].shape[1]
    length = -(-num_tokens // size)
    start, stop = min(rank * length, num_tokens), min((rank + 1) * length, num_tokens)
    if size == 1:  # the first text, and one text of all others: without any bound attention would ask the positions
        bounds = torch.tensor([0, int(bounds[1]), num_tokens])
    bounds = torch.cat([torch.tensor([start]), bounds[(bounds > start) & (bounds < stop)], torch.tensor([stop])])
    module, *others = model.children()
    hidden = torch.zeros(1, num_tokens, module.get_embedding_dimension(), dtype=model.dtype)
    with torch.no_grad():
        if start < stop:
            share = _cut(features, start, stop, (bounds - start).int())
            hidden[:, start:stop] = module(share)["token_embeddings"]
        if size > 1:
            dist.all_reduce(hidden, group=group)
        features = {**features, "token_embeddings": hidden}
        for child in others:
            features = child(features)
    return features["sentence_embedding"]


def _cut(features: dict[str, Any], start: int, stop: int, bounds: torch.Tensor) -> dict[str, object]:
    """Tokens of a flat row, as texts that end at `bounds`."""
    row = {name: features[name][:, start:stop] for name in ("input_ids", "position_ids")}
    longest = int(bounds.diff().max())
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {**row, **flash, "modality": "text"}

"""Every loss of sentence-transformers with a batch for it: how it is built, its columns, its labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sentence_transformers.sentence_transformer import losses

from .embedding import columns, embedder, gradients_of


A, B, C = (5, 1, 9, 3), (17, 4, 2, 30), (2, 8, 6, 4)
CLASSES = torch.tensor([0, 1, 0, 1])
SCORES = torch.tensor([0.1, 0.9, 0.4, 0.7], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One batch for one loss; `refused` is what a trainer of ours says instead of training with it."""

    build: Callable
    lengths: tuple
    labels: torch.Tensor | None = None
    refused: str | None = None


def vectors(width: int) -> torch.Tensor:
    return torch.sin(torch.arange(4.0 * width, dtype=torch.float64)).view(4, width)


def guide(name: str = "roberta", attention: str = "sdpa"):
    """A frozen model of another kind with the same vocabulary, which counts positions from another number."""
    return embedder(name, attention).requires_grad_(False)


def _mnrl(model):
    return losses.MultipleNegativesRankingLoss(model)


CASES = {
    "AdaptiveLayerLoss": Case(lambda m: losses.AdaptiveLayerLoss(m, _mnrl(m), n_layers_per_step=-1), (A, B)),
    "AnglELoss": Case(losses.AnglELoss, (A, B), SCORES),
    "BatchAllTripletLoss": Case(losses.BatchAllTripletLoss, (B,), CLASSES),
    "BatchHardSoftMarginTripletLoss": Case(losses.BatchHardSoftMarginTripletLoss, (B,), CLASSES),
    "BatchHardTripletLoss": Case(losses.BatchHardTripletLoss, (B,), CLASSES),
    "BatchSemiHardTripletLoss": Case(losses.BatchSemiHardTripletLoss, (B,), CLASSES),
    "CachedGISTEmbedLoss": Case(lambda m: losses.CachedGISTEmbedLoss(m, guide(), mini_batch_size=3), (A, B, C)),
    "CachedMultipleNegativesRankingLoss": Case(
        lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=3), (A, B)
    ),
    "CachedMultipleNegativesSymmetricRankingLoss": Case(
        lambda m: losses.CachedMultipleNegativesSymmetricRankingLoss(m, mini_batch_size=3), (A, B)
    ),
    "CoSENTLoss": Case(losses.CoSENTLoss, (A, B), SCORES),
    "ContrastiveLoss": Case(losses.ContrastiveLoss, (A, B), CLASSES),
    "ContrastiveTensionLoss": Case(losses.ContrastiveTensionLoss, (A, B), CLASSES),
    "ContrastiveTensionLoss without labels": Case(
        losses.ContrastiveTensionLoss, (A, A), None, "`ContrastiveTensionLoss` without labels reads rows of tokens"
    ),
    "ContrastiveTensionLossInBatchNegatives": Case(losses.ContrastiveTensionLossInBatchNegatives, (A,)),
    "CosineSimilarityLoss": Case(losses.CosineSimilarityLoss, (A, B), SCORES),
    "DenoisingAutoEncoderLoss": Case(
        losses.DenoisingAutoEncoderLoss, (A, B), None, "`DenoisingAutoEncoderLoss` reads rows of tokens"
    ),
    "DistillKLDivLoss": Case(losses.DistillKLDivLoss, (A, B, C), torch.stack([SCORES, 1 - SCORES], 1)),
    "EmbedDistillLoss": Case(lambda m: losses.EmbedDistillLoss(m, projection_dim=7), (A,), vectors(7)),
    "GISTEmbedLoss": Case(lambda m: losses.GISTEmbedLoss(m, guide()), (A, B, C)),
    "GlobalOrthogonalRegularizationLoss": Case(losses.GlobalOrthogonalRegularizationLoss, (A, B)),
    "MSELoss": Case(losses.MSELoss, (A,), vectors(48)),
    "MarginMSELoss": Case(losses.MarginMSELoss, (A, B, C), SCORES),
    "Matryoshka2dLoss": Case(
        lambda m: losses.Matryoshka2dLoss(m, _mnrl(m), [48, 16], n_layers_per_step=-1, n_dims_per_step=-1), (A, B)
    ),
    "MatryoshkaLoss": Case(lambda m: losses.MatryoshkaLoss(m, _mnrl(m), [48, 16]), (A, B)),
    "MatryoshkaLoss with a guide": Case(
        lambda m: losses.MatryoshkaLoss(m, losses.GISTEmbedLoss(m, guide()), [48, 16]), (A, B)
    ),
    "MegaBatchMarginLoss": Case(lambda m: losses.MegaBatchMarginLoss(m, mini_batch_size=2), (A, B)),
    "MultipleNegativesRankingLoss": Case(_mnrl, (A, B, C)),
    "MultipleNegativesSymmetricRankingLoss": Case(losses.MultipleNegativesSymmetricRankingLoss, (A, B)),
    "OnlineContrastiveLoss": Case(losses.OnlineContrastiveLoss, (A, B), CLASSES),
    "SoftmaxLoss": Case(lambda m: losses.SoftmaxLoss(m, m.get_embedding_dimension(), 2), (A, B), CLASSES),
    "TripletLoss": Case(losses.TripletLoss, (A, B, C)),
}


def built(case: Case, model) -> torch.nn.Module:
    """The loss of a case, in double precision, the same weights whenever it is built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.build(model).double()


def numbers(case: Case, model, loss: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one batch of ragged texts, and every gradient of the model and of what the loss trains itself."""
    loss.eval()
    value = loss(columns(model, *case.lengths), case.labels)
    value = torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
    value.backward()
    both = torch.nn.ModuleDict({"loss": loss, "model": model})
    return value.detach(), gradients_of(both)

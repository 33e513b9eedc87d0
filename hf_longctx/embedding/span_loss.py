"""`SpanRankingLoss`: find the span that answers a query among all spans of all documents.

Documents are embedded whole, so every span's vector knows what stands around it (late chunking), and the other spans
of the same document are the hardest negatives there are. Price: queries times spans scores at once; both are few where
documents are long.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from ..parallel.collectives import gather_integer_rows, gather_rows
from ..parallel.mesh import SequenceMesh
from .spans import spans_of_rows


try:
    from sentence_transformers.base.losses.gradcache import CachedLossMixin

    from .gradient_cache import cached_loss
    from .tiled_ranking_loss import negatives_group
except ImportError as error:
    raise ImportError("`SpanRankingLoss` needs sentence-transformers: `pip install hf-longctx[embedding]`.") from error


class SpanRankingLoss(CachedLossMixin, torch.nn.Module):
    """Cross entropy of cosine scores between queries and all spans of the batch.

    Rows have two text columns, a query and a document; a column named as the document's with `_spans` behind it, the
    `[start, end]` characters of its spans; and `label`, the number of the span that answers the query.

    Args:
        model (`SentenceTransformer`): packed by [`pack_embeddings`]; a trainer of ours does it.
        scale (`float`, *optional*, defaults to 20.0): what cosines are multiplied by.
        mini_batch_size (`int`, *optional*, defaults to 8): texts that the model sees at a time, with GradCache.
        mini_batch_num_tokens (`int`, *optional*): tokens that the model sees at a time, instead.
        gather_across_devices (`bool`, *optional*, defaults to `True`): spans of all data-parallel ranks of `mesh`.
        mesh ([`SequenceMesh`], *optional*): who has which rows; a trainer sets it.

    Raises on a call:
        ValueError: other than two columns, no spans, no labels, or a label that names no span of its document.

    Normalization: `ranks * (sum over my queries) / (queries of all ranks)`, over the `dp` axis.
    Communication: two small all-gathers of integers, one all-gather of span vectors, one reduce-scatter in the
        backward.
    Source: Late Chunking, https://huggingface.co/papers/2409.04701.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        scale: float = 20.0,
        mini_batch_size: int = 8,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = True,
        show_progress_bar: bool = False,
        *,
        mesh: SequenceMesh | None = None,
    ) -> None:
        super().__init__()
        self.model, self.scale, self.mesh = model, scale, mesh
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.gather_across_devices, self.show_progress_bar = gather_across_devices, show_progress_bar

    def bind(self, mesh: SequenceMesh) -> None:
        """Take spans from the data-parallel ranks of `mesh`; a trainer calls this through `bind_losses`."""
        self.mesh = mesh

    def forward(self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        features = list(sentence_features)
        positives = _positive_spans(features, labels)

        def calculate(embeddings: list[list[torch.Tensor]]) -> torch.Tensor:
            queries, spans = (torch.cat(parts) for parts in embeddings)
            loss = self._rank(queries, spans, positives)
            if torch.is_grad_enabled():
                loss.backward()
            return loss.detach()

        return cached_loss(self, features, calculate)

    def _rank(self, queries: torch.Tensor, spans: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        group = negatives_group(self)
        counts = torch.tensor([len(queries), len(spans)], device=spans.device)
        everyone = gather_integer_rows(counts, group).tolist()
        rank = 0 if group is None or self.mesh is None else self.mesh.data_parallel_rank
        before = sum(num_spans for _, num_spans in everyone[:rank])
        num_queries = sum(each for each, _ in everyone)
        wide = torch.promote_types(spans.dtype, torch.float32)
        spans = F.normalize(spans.to(wide), dim=1)
        (spans,) = gather_rows([spans], [each for _, each in everyone], group)
        scores = self.scale * F.normalize(queries.to(wide), dim=1) @ spans.T
        return len(everyone) * F.cross_entropy(scores, positives + before, reduction="sum") / num_queries

    def get_config_dict(self) -> dict[str, Any]:
        names = ("scale", "mini_batch_size", "mini_batch_num_tokens", "gather_across_devices")
        return {name: getattr(self, name) for name in names}


def _positive_spans(features: list[dict[str, torch.Tensor]], labels: torch.Tensor | None) -> torch.Tensor:
    """Where the span of each row stands among all spans of the rows."""
    if len(features) != 2 or "span_ids" not in features[1]:
        raise ValueError(
            f"`SpanRankingLoss` got {len(features)} column(s), of which {sum('span_ids' in c for c in features)} have "
            "spans: it needs a query and a document, with a column of spans named as the document's and `_spans`."
        )
    bounds = features[1]["cu_seq_lens_q"].long()
    starts = spans_of_rows(features[1]["span_ids"][0], bounds).starts
    first = torch.searchsorted(starts, bounds)
    counts = first.diff()
    if labels is None:
        raise ValueError(
            "`SpanRankingLoss` got no labels: add a column `label` with the number of the span that answers the query."
        )
    wrong = ((labels < 0) | (labels >= counts)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"`label` of row {row} is {int(labels[row])}, but its document has {int(counts[row])} span(s), numbered "
            "from 0."
        )
    return first[:-1] + labels

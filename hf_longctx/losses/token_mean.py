"""Cross entropy as a sum over my tokens divided by the tokens of the whole step, for models that cannot do it
themselves.

Some heads (BERT's masked language model among them) average over the tokens they see and ignore `num_items_in_batch`.
The mean of such means over shards is not the mean over the row, so their loss is computed here, from their logits.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from ..parallel.shard import IGNORE_INDEX


def token_mean(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | float | None = None) -> torch.Tensor:
    """Sum of the valid tokens' cross entropy, divided by `num_items_in_batch`. Fits `Trainer(compute_loss_func=...)`.

    Args:
        outputs: model outputs with `logits` of shape `(B, t, V)`, already aligned with `labels`: nothing is shifted.
        labels (`torch.Tensor` of shape `(B, t)`): -100 is ignored.
        num_items_in_batch (*optional*): valid tokens of the whole optimizer step; defaults to those in `labels`.

    Returns:
        `torch.Tensor`: a scalar in the precision of fp32.

    Relations: equals `torch.nn.functional.cross_entropy(..., reduction="mean")` on one process with one micro-batch.
    Normalization: by `num_items_in_batch`.
    """
    total = cross_entropy(
        outputs["logits"].float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    count = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)

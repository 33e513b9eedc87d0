"""How far LSH attention is from full attention on the rows of a proof: it decides nothing."""

from __future__ import annotations

import torch

from ..adapters.hashed import use_lsh
from ..attention.lsh_models import runs_lsh_attention
from ..config.lsh_settings import LSHConfig
from .numbers import Numbers, of_one_process, relative
from .random_rows import Rows


def distance_to_full_attention(model: torch.nn.Module, task: str, rows: Rows, hashed: Numbers) -> float | None:
    """The largest difference of outputs, relative to the largest of them; `None` for a model without LSH attention.

    Full attention is that of one bucket and a window as long as the row, with the same shared queries and keys.

    Args:
        model (`torch.nn.Module`): of one process.
        task (`str`), rows ([`Rows`]): what it computes.
        hashed ([`Numbers`]): of the same rows under LSH attention.
    """
    if not runs_lsh_attention(model.config):
        return None
    whole = max(rows.batch["input_ids"].shape[1], 2)
    handle = use_lsh(model, LSHConfig(num_hashes=1, num_buckets=1, window=whole))
    try:
        return relative(of_one_process(model, task, rows).outputs, hashed.outputs)
    finally:
        handle.remove()

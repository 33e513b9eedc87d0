"""Collate full rows, then keep one rank's share, all in the data worker.

The collator a user brings stays as it is: it sees the full rows and makes the full batch. `ShardCollator` wraps it and
cuts the result, so labels are shifted over whole rows and the trainer counts every token once over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..parallel.mesh import SequenceMesh
from ..parallel.shard import IGNORE_INDEX, cut_batch
from .evaluation_rows import DummySample


class ShardCollator:
    """Wrap `collator` so that it returns this rank's share of the batch.

    Args:
        collator (`Callable`): makes a batch of full rows, with `labels` of shape `(B, T)`.
        mesh ([`SequenceMesh`]): the axes of the run; only its sizes and ranks are kept, so workers can be started by
            any method.
        inner_attention (`str`, *optional*, defaults to `"auto"`): see [`LongContextConfig`].
        shift_labels (`bool`, *optional*, defaults to `True`): the model predicts the next token.
        position_axes (`int`, *optional*): axes of the model's rotary embedding, as
            [`position_axes`][hf_longctx.families.position_axes] says, where batches have 3-D `position_ids`.

    Returns of a call:
        `dict`: the share, with an unbound `sequence_shard`: bind it in the main process with `.bind(mesh)`.

    Raises on a call:
        ValueError: the batch has no `labels` of shape `(B, T)`, or see [`shard_batch`].

    Communication: none.
    """

    def __init__(
        self,
        collator: Callable,
        mesh: SequenceMesh,
        *,
        inner_attention: str = "auto",
        shift_labels: bool = True,
        position_axes: int | None = None,
    ) -> None:
        self.collator = collator
        self.size, self.rank = mesh.sequence_parallel_size, mesh.sequence_parallel_rank
        self.inner_attention, self.shift_labels = inner_attention, shift_labels
        self.position_axes = position_axes

    def __call__(self, rows: list) -> dict[str, object]:
        real = [row for row in rows if not isinstance(row, DummySample)]
        collated = self.collator(real or [rows[0].row])
        if not isinstance(collated, Mapping):
            raise ValueError(
                f"the collator returned a `{type(collated).__name__}`, but a batch is a mapping from names to "
                "tensors: return a dictionary with `input_ids` and `labels`."
            )
        batch = dict(collated)
        if batch.get("labels") is None:
            raise ValueError(
                f"the collated batch ({', '.join(batch)}) has no `labels`, so no token would be trained: add a "
                "`labels` column, or use a collator that makes them, such as "
                "`DataCollatorForLanguageModeling(tokenizer, mlm=False)`."
            )
        if not real:
            for key in ("labels", "shift_labels"):
                if key in batch:
                    batch[key] = batch[key].new_full(batch[key].shape, IGNORE_INDEX)
        return cut_batch(
            batch,
            self.size,
            self.rank,
            inner_attention=self.inner_attention,
            shift_labels=self.shift_labels,
            position_axes=self.position_axes,
        )

"""Tables of positions that count their tokens themselves, or grow with the local length.

RoFormer counts from 0 whatever a batch says, TrOCR's sinusoidal table skips padding tokens, and XGLM's is as long as
the longest call so far. On a share of a row each looks up what it would in the whole row, and in a packed row what it
would for each document alone.
Price: a few integers a token; for TrOCR's table one all-gather of them. Once a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...attention.implicit_positions import local_positions, local_share, longest_document, packs_documents
from ...parallel.collectives import gather_sequence
from ...parallel.shard import SequenceShard
from ..instance_forward import named_arguments, put_on
from ..pass_shard import ShardReader


COUNTED_TABLE = "counted positions"


def count_positions(model: torch.nn.Module) -> None:
    """Patch the tables of positions in `model` that would count a rank's tokens."""
    for module in list(model.modules()):
        if table_of(module) is not None:
            put_on(module, TablePatch())


def table_of(module: torch.nn.Module) -> Callable | None:
    """How a table looks positions up, by its class, or `None`."""
    return next((TABLES[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in TABLES), None)


class TablePatch(ShardReader):
    """Looks up the positions of whole rows and single documents."""

    name = COUNTED_TABLE

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows, look_up = self.rows_of_call(module), table_of(module)
        if rows.shard is None or look_up is None:
            return own(*args, **kwargs)
        return look_up(module, own, named_arguments(module, args, kwargs), rows.shard)


def _roformer(table: Any, own: Callable, given: dict[str, Any], shard: SequenceShard) -> torch.Tensor:
    """`(t, H)`, or `(B, t, H)` for packed rows."""
    positions = local_positions(shard)
    if positions is not None:
        _validate_length(table, shard)
        given["position_ids"] = positions.to(table.weight.device)
    return own(**given)


def _validate_length(table: Any, shard: SequenceShard) -> None:
    """Raise `ValueError` on every rank for a document longer than the table; only some may look it up."""
    known, longest = table.num_embeddings, shard.num_tokens
    if longest > known and (longest := longest_document(shard)) > known:
        raise ValueError(
            f"a document has {longest:,} tokens, but `{type(table).__name__}` has positions for {known:,}: shorten "
            "documents, or load the model with a larger `max_position_embeddings`."
        )


def _xglm(table: Any, own: Callable, given: dict[str, Any], shard: SequenceShard) -> torch.Tensor:
    """With as many rows as one process would have made."""
    needed = table.offset + max(shard.num_tokens, shard.num_positions or 0)
    if needed > len(table.weights):
        table.make_weights(needed, table.embedding_dim, table.padding_idx)
    return own(**given)


@torch.no_grad()
def _trocr(table: Any, own: Callable, given: dict[str, Any], shard: SequenceShard) -> torch.Tensor:
    """TrOCR's sinusoidal table, which counts the tokens that are not `pad_token_id`."""
    mine = given["input_ids"]
    is_token = gather_sequence(mine.ne(table.padding_idx).int(), shard.group)[:, : shard.num_tokens]
    counts = is_token.cumsum(1)
    if shard.segment_ids is not None and packs_documents(shard):
        segments = shard.segment_ids.to(counts.device)
        begins = torch.nn.functional.pad(segments.diff(dim=1) != 0, (1, 0), value=True)
        before = torch.where(begins, counts - is_token, 0)
        counts = counts - before.cummax(1).values
    positions = local_share(shard, counts * is_token) + table.padding_idx
    needed = table.padding_idx + 1 + shard.num_tokens
    if table.weights is None or needed > len(table.weights):
        table.weights = table.get_embedding(needed, table.embedding_dim, table.padding_idx)
    return table.weights.to(mine.device)[positions].detach()


TABLES: dict[str, Callable[[Any, Callable, dict[str, Any], SequenceShard], torch.Tensor]] = {
    "RoFormerSinusoidalPositionalEmbedding": _roformer,
    "TrOCRSinusoidalPositionalEmbedding": _trocr,
    "XGLMSinusoidalPositionalEmbedding": _xglm,
}

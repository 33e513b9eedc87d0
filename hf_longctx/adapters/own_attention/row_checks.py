"""Modules that read more of a whole row than a share or a packed row shows them: looked at before they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...attention.implicit_positions import packs_documents
from ...parallel.shard import SequenceShard
from ..instance_forward import named_arguments, put_on
from ..pass_shard import ShardReader


ROW_CHECK = "row check"


def check_rows(model: torch.nn.Module) -> None:
    """Patch the modules of `model` that would read whole rows."""
    for module in list(model.modules()):
        if _check_of(module) is not None:
            put_on(module, RowCheckPatch())


def _check_of(module: torch.nn.Module) -> Callable | None:
    return next((CHECKS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in CHECKS), None)


class RowCheckPatch(ShardReader):
    """Refuses a call whose result one process would compute from the whole row or from one document."""

    name = ROW_CHECK

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        rows, check = self.rows_of_call(module), _check_of(module)
        if rows.shard is not None and check is not None:
            check(module, named_arguments(module, args, kwargs), rows.shard)
        return own(*args, **kwargs)


def _xlm(module: Any, given: dict[str, Any], shard: SequenceShard) -> None:
    """XLM and FlauBERT count the tokens of a row that are no padding, and hide as many at its end as are left."""
    ids, name = given.get("input_ids"), type(module).__name__
    if given.get("lengths") is not None:
        raise ValueError(
            f"`lengths` are those of whole rows, and `{name}` gets a share or packed documents: pass an "
            "`attention_mask` in their place."
        )
    if given.get("attention_mask") is None and ids is not None:
        is_padding = ids[:, : shard.num_local_tokens] == module.config.pad_index
        if bool(is_padding.any()):
            raise ValueError(
                f"the batch holds `pad_index` ({module.config.pad_index}) and has no `attention_mask`, so `{name}` "
                "would hide as many tokens at the end of a share or a packed row: pass an `attention_mask`."
            )


def _tapas(module: Any, given: dict[str, Any], shard: SequenceShard) -> None:
    """TAPAS numbers the tokens of every cell of a table from 0, where it gets no positions."""
    types = given.get("token_type_ids")
    has_own = shard.has_own_positions and not packs_documents(shard)
    if has_own or types is None or not module.config.reset_position_index_per_cell:
        return
    if bool(types[..., 1:3].any()):
        raise NotImplementedError(
            "TAPAS numbers the tokens of every cell of a table from 0 (`reset_position_index_per_cell`), and a share "
            "or a packed row has positions that count on: pass `position_ids` of rows that are not packed, or set the "
            "field to False."
        )


CHECKS: dict[str, Callable[[Any, dict[str, Any], SequenceShard], None]] = {
    "FlaubertModel": _xlm,
    "TapasEmbeddings": _tapas,
    "XLMModel": _xlm,
}

"""Texts as one flat row without padding, with everything that the model must know about each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening

from ..adapters.instance_forward import InstancePatch


PACKED = "packed embeddings"
# What looks vectors up by token ids.
_LOOKUPS = {F.embedding, F.embedding_bag, torch.embedding, torch.embedding_bag}
_LOOKUPS |= {torch.index_select, torch.Tensor.index_select}
# In features: the names of what a model's modules wrote into them.
MODULE_OUTPUTS = "module_outputs"
# In features: the position of the first token of a text, which sentence-transformers adds to `position_ids`.
POSITION_OFFSET = "position_offset"
# Of a flat row, and of no padded one.
_FLAT_KEYS = (
    POSITION_OFFSET,
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "position_ids",
)


class FlatCollator(DataCollatorWithFlattening):
    """transformers' flattening of tokenized texts, plus what it drops: token types and character offsets.

    Called with one dict a text, it returns `input_ids` ([`FlatIds`]) and `position_ids` of shape `(1, T)`, `seq_idx`,
    and the bounds of FlashAttention's convention. `token_type_ids` `(1, T)` are kept where a text has a second part,
    and `offset_mapping` `(T, 2)` where the tokenizer was asked for it.

    Raises on a call:
        ValueError: a text has no token, so that there is nothing to pool.
    """

    def __init__(self, position_offset: int = 0) -> None:
        self.position_offset = position_offset
        super().__init__(return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True)

    def __call__(self, features, return_tensors=None, separator_id=None):
        empty = [index for index, text in enumerate(features) if len(text["input_ids"]) == 0]
        if empty:
            raise ValueError(
                f"text {empty[0]} of a batch of {len(features)} has no token, and {len(empty) - 1} more: an embedding "
                "needs at least one; remove empty texts from the data."
            )
        batch = super().__call__(features, return_tensors, separator_id)
        batch["input_ids"] = batch["input_ids"].as_subclass(FlatIds)
        batch[POSITION_OFFSET] = self.position_offset
        types = [kind for text in features for kind in text.get("token_type_ids", ())]
        if any(types):
            batch["token_type_ids"] = torch.tensor([types])
        if "offset_mapping" in features[0]:
            batch["offset_mapping"] = torch.tensor([pair for text in features for pair in text["offset_mapping"]])
        return batch


class FlatIds(torch.Tensor):
    """Token ids of several texts in one row, which only a packed model may read.

    A loss passes features to whatever models it holds. One that was not packed would take the row for one text and be
    wrong in silence, so looking vectors up by these ids raises; a packed model takes the plain ids out first.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _LOOKUPS or (func is torch.Tensor.__getitem__ and _looks_rows_up(*args)):
            _refuse_reader()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return _as_ids(result) if func not in _LEAVES_SUBCLASS else result

    def __deepcopy__(self, memo):
        return plain_ids(self).clone().as_subclass(FlatIds)


# Pickling names the class itself.
_LEAVES_SUBCLASS = {torch.Tensor.__reduce_ex__, torch.Tensor.as_subclass}


def _as_ids(result: Any) -> Any:
    """Whole numbers that come out of token ids are taken for token ids; nothing else is."""
    if isinstance(result, list | tuple) and type(result) in (list, tuple):
        return type(result)(map(_as_ids, result))
    is_ids = isinstance(result, torch.Tensor) and result.dtype in (torch.int64, torch.int32)
    return result.as_subclass(FlatIds) if is_ids else result


def _looks_rows_up(table: object, index: object = None) -> bool:
    return (
        isinstance(index, FlatIds) and isinstance(table, torch.Tensor) and table.is_floating_point() and table.ndim > 1
    )


def plain_ids(ids):
    """Token ids that may be looked up."""
    return ids.as_subclass(torch.Tensor) if isinstance(ids, FlatIds) else ids


def _refuse_reader() -> None:
    raise ValueError(
        "token ids of several texts in one row reached a model that is not packed, which would read them as one text:"
        " if a loss holds this model (a guide, a teacher, a decoder), train with "
        "`LongContextSentenceTransformerTrainer`, which pads for it, or load it with attn_implementation='packed' and "
        "call `hf_longctx.pack_embeddings` on it, too."
    )


def drop_outputs(features: Mapping[str, Any]) -> dict[str, Any]:
    """Features without what the modules of a model wrote into them: they may be read again, by the same or another."""
    outputs = (*features.get(MODULE_OUTPUTS, ()), MODULE_OUTPUTS)
    return {key: value for key, value in features.items() if key not in outputs}


def pad_flat(features: Mapping[str, Any], tokenizer) -> dict[str, Any]:
    """A flat row as sentence-transformers' padded batch, for a model that was not packed.

    Args:
        features (`Mapping`): of one column, flat.
        tokenizer: of the model, which knows its padding; without one, zeros at the right.
    """
    bounds = features["cu_seq_lens_q"].tolist()
    per_token = {key: features[key][0] for key in ("input_ids", "token_type_ids") if key in features}
    rows = [{key: plain_ids(row)[a:b].tolist() for key, row in per_token.items()} for a, b in zip(bounds, bounds[1:])]
    padded = {key: value for key, value in drop_outputs(features).items() if key not in (*_FLAT_KEYS, *per_token)}
    if callable(getattr(tokenizer, "pad", None)):
        batch = dict(tokenizer.pad(rows, return_tensors="pt"))
    else:
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {key: torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in rows]) for key in rows[0]}
    return {**padded, **{key: value.to(features["input_ids"].device) for key, value in batch.items()}}


class ReaderPatch(InstancePatch):
    """On the model: its own modules may look token ids up, and what they write is known as output.

    A loss may hand the same features to this model again, or to another one, which then read inputs only.
    """

    name = PACKED

    def call(self, module: torch.nn.Module, own: Callable, *args: Any, **kwargs: Any) -> Any:
        features, *rest = args or (kwargs.pop("input"),)
        if "cu_seq_lens_q" not in features:
            return own(features, *rest, **kwargs)
        before, ids = {*features, "input_ids"}, features["input_ids"]
        features["input_ids"] = plain_ids(ids)
        try:
            output = own(features, *rest, **kwargs)
        finally:
            features["input_ids"] = ids
        written = [key for key in output if key not in before]
        output["input_ids"] = features["input_ids"]
        output[MODULE_OUTPUTS] = (*output.get(MODULE_OUTPUTS, ()), *written)
        return output

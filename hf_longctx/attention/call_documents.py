"""Which documents the rows of a call hold, where no shard says so.

A batch tells by flat bounds, by an index, by positions that restart, or by its mask. What is read becomes the shard of
one process, so that everything behind it is the code of shared rows.
Price: the batch's bounds are read once a forward, not once a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..families import position_axes
from ..parallel.position_planes import rotary_positions, text_positions
from ..parallel.segments import DOCUMENT_BOUND_KEYS, position_facts, segment_rows
from ..parallel.shard import SequenceShard
from .call import AttentionCall
from .deferred import DeferredMask
from .masks import packed_documents
from .registry import find_attention


# What the tokens of a forward are called.
TOKEN_NAMES = ("input_ids", "inputs_embeds", "hidden_states")


def documents_of_call(call: AttentionCall) -> SequenceShard | None:
    """The documents that this call packs, as the shard of one process, or `None` for rows of one document each.

    Raises:
        ValueError: a cache with several documents in a row, or bounds that do not describe the rows.
    """
    has_bounds = any(call.extras.get(name) is not None for name in DOCUMENT_BOUND_KEYS)
    if call.query.shape[2] != call.key.shape[2]:  # a cache or cross-attention: the bounds are of other tokens
        if has_bounds:
            refuse_cache()
        return None
    if torch.compiler.is_compiling() and not has_bounds:
        return None  # transformers describes documents in the mask itself then
    return _once_a_forward(call, "documents", lambda: _read_documents(call, has_bounds))


def rows_of_call(call: AttentionCall) -> SequenceShard:
    """Rows of one document each with their padding, for an attention that has no other way to run them.

    Raises:
        NotImplementedError: keys of other tokens than the queries', or a mask that the model made itself.
    """
    tokens, keys = call.query.shape[2], call.key.shape[2]
    own_mask = call.mask is not None and not isinstance(call.mask, DeferredMask)
    if tokens != keys or own_mask:
        mask = f"a mask of {type(call.mask).__name__} that the model made itself"
        raise NotImplementedError(
            f"`{type(call.module).__name__}` attends from {tokens} to {keys} tokens"
            f"{' with ' + mask if own_mask else ''}, but attn_implementation={call.entry.name!r} computes whole rows "
            "under transformers' own masks only: pass `use_cache=False`, or run this model on 'sdpa'."
        )
    rows = len(call.query)
    facts = {"attention_mask": call.mask.padding if isinstance(call.mask, DeferredMask) else None}
    return _once_a_forward(call, "rows", lambda: shard_of_rows(facts, rows, tokens, call.query.device))


def _once_a_forward(call: AttentionCall, name: str, read: Callable) -> Any:
    """What `read()` returns; all layers of a forward share its mask, and so the result."""
    return call.mask.once(name, read) if isinstance(call.mask, DeferredMask) else read()


@torch.compiler.disable
def _read_documents(call: AttentionCall, has_bounds: bool) -> SequenceShard | None:
    """See [`documents_of_call`]."""
    rows, _, num_tokens, _ = call.query.shape
    mask = call.mask if isinstance(call.mask, DeferredMask) else None
    padding = None if mask is None else mask.padding
    facts = {**document_facts(call.extras, num_tokens), "attention_mask": padding}
    shard = shard_of_rows(facts, rows, num_tokens, call.query.device)
    if has_bounds:
        _validate_positions_restart(call, facts.get("position_ids"), shard)
    if shard.segment_ids is None and mask is not None and padding is None:
        segments = packed_documents(mask.mask_function)
        shard = replace(shard, segment_ids=segments, only_right_padding=segments is None)
    is_packed = has_bounds or (shard.segment_ids is not None and padding is None)
    # A model that keeps its positions from attention shows documents in the mask alone, and a cache hides them there.
    # A name that does nothing but pack was chosen in order to pack.
    means_to_pack = call.entry.packs_rows and not call.entry.shards_rows
    is_hidden = means_to_pack and torch.is_grad_enabled() and "position_ids" not in call.extras and padding is None
    if call.extras.get("use_cache") and (is_packed or is_hidden):
        refuse_cache()
    return shard if is_packed else None


def _validate_positions_restart(call: AttentionCall, positions: Any, shard: SequenceShard) -> None:
    """Refuse bounds of documents whose positions count on from one to the next, where positions are absolute.

    Rotary ones only matter by their differences, so they are right either way.
    """
    config = getattr(call.module, "config", None)
    if positions is None or shard.segment_ids is None or getattr(config, "rope_parameters", None) is not None:
        return
    begins = shard.segment_ids.diff(dim=1) != 0
    if bool((begins & (positions.diff(dim=1) == 1)).any()):
        raise ValueError(
            f"`cu_seq_lens_q` or `seq_idx` bound documents, but the positions of `{type(call.module).__name__}` "
            "count on across them: pass `position_ids` that restart at each document, as `PackingCollator` does."
        )


def document_facts(given: Mapping[str, object], num_tokens: int, axes: int = 0) -> dict[str, object]:
    """What tells documents among the keyword arguments of a model or of its attention: bounds and positions.

    Args:
        given (`Mapping`): by name.
        num_tokens (`int`): of a row.
        axes (`int`, *optional*): see [`position_axes`][hf_longctx.families.position_axes].
    """
    facts = {name: given[name] for name in DOCUMENT_BOUND_KEYS if given.get(name) is not None}
    positions = text_positions(given, axes) if axes else given.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape[1] == num_tokens:
        facts["position_ids"] = positions
    return facts


def shard_of_forward(module: torch.nn.Module, given: Mapping[str, Any]) -> SequenceShard | None:
    """The shard that a module's forward got, or the documents of a batch that no one has cut."""
    return given.get("sequence_shard") or documents_of_forward(getattr(module, "config", None), given)


def documents_of_forward(config, given: Mapping[str, Any]) -> SequenceShard | None:
    """The documents of a batch that no one has cut, from the arguments of a module's forward.

    Args:
        config (`PretrainedConfig`, *optional*): of the module; without an attention of ours there are none.
        given (`Mapping`): the arguments by name.

    Returns:
        [`SequenceShard`] of one process, or `None` for rows of one document each.
    """
    tokens = next((given[name] for name in TOKEN_NAMES if given.get(name) is not None), None)
    mask = given.get("attention_mask")
    is_padded = isinstance(mask, torch.Tensor) or getattr(mask, "padding", None) is not None
    if tokens is None or is_padded or find_attention(getattr(config, "_attn_implementation", None)) is None:
        return None
    rows, num_tokens = tokens.shape[:2]
    axes = position_axes(config) if hasattr(config, "get_text_config") else 0
    facts = document_facts(given, num_tokens, axes)
    shard = shard_of_rows(facts, rows, num_tokens, tokens.device)
    if shard.segment_ids is None and isinstance(mask, DeferredMask):  # a layer inside the model sees no positions
        segments = packed_documents(mask.mask_function)
        return None if segments is None else SequenceShard(1, 0, num_tokens, num_tokens, segments, False)
    if shard.segment_ids is None:
        return None
    positions = rotary_positions(given.get("position_ids"), axes) if "position_ids" in facts else None
    return shard if positions is None else replace(shard, **position_facts(shard.segment_ids, positions))


def shard_of_rows(facts: Mapping[str, object], rows: int, num_tokens: int, device: torch.device) -> SequenceShard:
    """Whole rows on one process; see [`segment_rows`] for what `facts` may hold."""
    segments, only_right_padding = segment_rows(facts, rows, num_tokens, device)
    # No one cut these rows, so positions are the batch's or the model's own.
    return SequenceShard(1, 0, num_tokens, num_tokens, segments, only_right_padding, has_own_positions=True)


def refuse_cache() -> None:
    """Raise `ValueError` for a cache with packed documents."""
    raise ValueError(
        "`use_cache` is on for a batch that packs documents, or could without attention seeing it: a cache holds one "
        "document a row, and hides the others; pass `use_cache=False`, or set `model.config.use_cache = False`."
    )

"""Masks of multimodal models over text: blocks that open a causal rule, and layers that only their mask makes causal.

Gemma 3, PaliGemma and similar models let the tokens of an image, or of a prefix, see each other in both directions.
The batch marks them (`token_type_ids`, `mm_token_type_ids`), and a rank sees the marks of its share only. So rows
without any are recognised as plain text, on all ranks alike, and others are refused.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import masking_utils

from ..parallel.collectives import gather_integers
from ..parallel.shard import SequenceShard
from .call import AttentionCall
from .deferred import DeferredMask
from .implicit_positions import packs_documents
from .padding_masks import padding_of_share


def read_text_mask(call: AttentionCall, shard: SequenceShard) -> object:
    """The mask of a call without the blocks that its rows have none of.

    Raises:
        NotImplementedError: a real token of the rows belongs to a block, on any rank; or whether rows are causal
            depends on the kernel that one process runs.

    Communication: where the model has such blocks, 8 bytes a rank, once a forward.
    """
    mask = call.mask
    if not isinstance(mask, DeferredMask):
        return mask
    blocks = list(_blocks(mask.mask_function))
    if not blocks:
        _refuse_kernels_that_disagree(call, mask, shard)
        return mask
    if mask.once("open blocks", lambda: _has_open_blocks(blocks, shard, len(call.query))):
        raise NotImplementedError(
            f"the batch marks tokens of images or of a prefix, which `{type(call.module).__name__}` lets see each "
            "other in both directions, and a rank sees its share of them only: train on text alone, whose "
            "`token_type_ids` or `mm_token_type_ids` mark nothing (0; for PaliGemma 1), or set "
            "`sequence_parallel_size` to 1, without packed rows."
        )
    return mask.once("without blocks", lambda: mask.with_function(_without_blocks(mask.mask_function)))


def _parts(function: Callable, maker: str) -> tuple[Callable, ...]:
    ours = getattr(function, "__module__", None) == masking_utils.__name__
    if not ours or not getattr(function, "__qualname__", "").startswith(f"{maker}."):
        return ()
    return inspect.getclosurevars(function).nonlocals["mask_functions"]


def _is_block(function: Callable) -> bool:
    ours = getattr(function, "__module__", None) == masking_utils.__name__
    return ours and getattr(function, "__qualname__", "").startswith("blockwise_over")


def _blocks(function: Callable) -> Iterator[torch.Tensor]:
    """The block of every token, -1 for none, from all unions inside a mask function."""
    for part in (*_parts(function, "or_masks"), *_parts(function, "and_masks")):
        if _is_block(part):
            yield inspect.getclosurevars(part).nonlocals["block_sequence_ids"]
        else:
            yield from _blocks(part)


def _without_blocks(function: Callable) -> Callable:
    union, all_of = _parts(function, "or_masks"), _parts(function, "and_masks")
    if all_of:
        return masking_utils.and_masks(*map(_without_blocks, all_of))
    kept = [_without_blocks(part) for part in union if not _is_block(part)]
    return function if not kept else kept[0] if len(kept) == 1 else masking_utils.or_masks(*kept)


def _has_open_blocks(blocks: list[torch.Tensor], shard: SequenceShard, rows: int) -> bool:
    found = False
    for ids in blocks:
        ids = ids[:, : shard.local_len].expand(rows, -1)
        found |= bool(((ids >= 0) & ~padding_of_share(shard, rows, ids.device)).any())
    if shard.size == 1 or shard.group is None:
        return found
    return any(gather_integers(int(found), shard.group))


def _refuse_kernels_that_disagree(call: AttentionCall, mask: DeferredMask, shard: SequenceShard) -> None:
    """Refuse a layer that says it is not causal under a mask that is, where transformers may leave the mask out."""
    if call.is_causal is not None or getattr(call.module, "is_causal", True):
        return
    packed = packs_documents(shard)
    has_padding = shard.segment_ids is not None and not packed
    if has_padding or not (packed or mask.may_be_left_out):
        return
    rule = mask.rule()
    reaches_all = rule.chunk is None and (rule.window is None or rule.window >= shard.num_tokens)
    if rule.causal and reaches_all and _runs_sdpa(type(call.module)):
        raise NotImplementedError(
            f"`{type(call.module).__name__}` is not causal (`is_causal` False) and its mask is: transformers leaves "
            "the mask of rows without padding out on 'sdpa', where tokens then see later ones, and not on 'eager'. "
            "Pass `token_type_ids` of 1 (PaliGemma: text that is predicted), or set `use_bidirectional_attention` to "
            "False in the text configuration."
        )


def _runs_sdpa(layer: type) -> bool:
    """Whether transformers runs the models of the file in which a layer is written on sdpa, where they have one."""
    written: dict[str, Any] = vars(sys.modules[layer.__module__])
    kinds = [kind for kind in written.values() if isinstance(kind, type) and kind.__module__ == layer.__module__]
    return any(getattr(kind, "_supports_sdpa", False) for kind in kinds)

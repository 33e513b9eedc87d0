"""What reaches attention besides query, key, value and mask, and would be lost: refused by name, on every path.

A kernel drops keyword arguments that it does not read, in silence: a sparse layer's selection of keys is then ignored
and the layer runs dense. So every keyword argument that an attention layer passes is one that its function computes, a
fact of the batch, or refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any

import torch

from ..parallel.segments import DOCUMENT_BOUND_KEYS
from .call import AttentionCall
from .deferred import DeferredMask
from .distance_bias import NUMBERS


# Keyword arguments that change the result and that cannot be cut by heads.
_SELECTIONS = ("indices", "block_indices")
_CHANGES_SCORES = ("position_bias", "sinks", "head_mask", *NUMBERS, *_SELECTIONS)
_NO_SIDE_INPUTS = ("sliding_window", "softcap")
# Facts of the batch, one number a token or a document, that pass through a model to its attention.
_BATCH_FACTS = frozenset(
    {"position_ids", "cache_position", "labels", "shift_labels", "num_items_in_batch", "token_type_ids"}
    | {"input_ids", "sequence_shard", *DOCUMENT_BOUND_KEYS, *_NO_SIDE_INPUTS}
)


def validate_side_inputs(call: AttentionCall, name: str) -> None:
    """Refuse what the attention of `call` would ignore, or could not cut by heads, on whole rows of some heads.

    Raises:
        NotImplementedError: a side input or setting that it does not compute.
        ValueError: a per-head input without one entry a head.
    """
    for key_name, extra in call.extras.items():
        bias_like = (
            isinstance(extra, torch.Tensor)
            and extra.dim() > 0
            and extra.is_floating_point()
            and key_name not in _BATCH_FACTS
        )
        refused = extra is not None and (key_name in (*_CHANGES_SCORES, "cache") or bias_like)
        if refused or _is_dropped(call.module, key_name, extra):
            raise NotImplementedError(
                f"`{name}` passes `{key_name}` to its attention, which cannot be split by heads yet: set "
                "`sequence_parallel_size` to 1 for this model, without packed rows, and load it with "
                "attn_implementation='eager'."
            )
    asked = {"dropout": call.dropout, "softcap": call.extras.get("softcap")}
    for key_name, value in asked.items():
        if value and key_name not in call.entry.takes:
            raise NotImplementedError(
                f"`{name}` asks for `{key_name}` ({value}), which attn_implementation={call.entry.name!r} does not "
                "compute: set it to 0 in the model's configuration, or run the model on another attention."
            )
    for key_name, tensor in call.per_head.items():
        if tensor is not None and (tensor.dim() == 0 or len(tensor) != call.query.shape[1]):
            raise ValueError(
                f"`{key_name}` has shape {tuple(tensor.shape)}, but attn_implementation={call.entry.name!r} cuts it "
                f"by heads: its first dimension must be the {call.query.shape[1]} query heads of `{name}`."
            )


def refuse_dropped_inputs(call: AttentionCall, kernel: str, function: Callable) -> None:
    """Refuse what `function` would drop where a kernel runs rows of one document as transformers runs them.

    Args:
        call ([`AttentionCall`]): all heads, no shard.
        kernel (`str`): the name of `function`, for the message.
        function (`Callable`): what it reads is what its signature names.

    Raises:
        NotImplementedError: a selection, a bias or another side input that it does not read.
    """
    for key_name, extra in call.extras.items():
        changes = extra is not None and key_name in _CHANGES_SCORES
        if (changes or _is_dropped(call.module, key_name, extra)) and not _reads(function, key_name):
            sparse = "run dense" if key_name in _SELECTIONS else "ignore it"
            raise NotImplementedError(
                f"`{type(call.module).__name__}` passes `{key_name}` to its attention, and "
                f"attn_implementation={call.entry.name!r}, whose kernel is {kernel!r} here, would {sparse}: call "
                "`hf_longctx.adapt(model, mesh)` once after loading, which serves most sparse layers, or load the "
                "model with attn_implementation='eager', without sharding or packed rows."
            )


def refuse_added_keys(call: AttentionCall) -> None:
    """Refuse a layer that adds keys of its own behind its tokens' (compressed ones), which no mask describes.

    Raises:
        NotImplementedError: there are more keys than transformers' mask has columns.
    """
    num_keys = call.mask.num_keys if isinstance(call.mask, DeferredMask) else None
    if num_keys is None or call.key.shape[2] <= num_keys:
        return
    raise NotImplementedError(
        f"`{type(call.module).__name__}` attends to {call.key.shape[2]} keys, {num_keys} of tokens and the "
        f"rest its own (such as compressed blocks), and attn_implementation={call.entry.name!r} cannot tell who sees "
        "those: call `hf_longctx.adapt(model, mesh)` once after loading, or load the model with "
        "attn_implementation='eager', without sharding or packed rows."
    )


def _is_dropped(module: torch.nn.Module, name: str, extra: object) -> bool:
    """Whether a keyword argument holds what the layer computed, not a fact of the batch that passes through it.

    More than two dimensions are never one number a token. Of the rest, a column of the batch has a name that the
    layer's own code does not know.
    """
    if name in _BATCH_FACTS:
        return False
    sizes = [tensor.dim() for tensor in _tensors(extra)]
    if not any(sizes) and not inspect.isfunction(extra):
        return False
    layer: Any = type(module)
    return max(sizes, default=0) > 2 or name in _names_in_code(layer)


def _tensors(extra: object) -> Iterator[torch.Tensor]:
    if isinstance(extra, torch.Tensor):
        yield extra
    elif isinstance(extra, (list, tuple)):
        for item in extra:
            yield from _tensors(item)
    elif isinstance(extra, Mapping):
        yield from _tensors(list(extra.values()))


@lru_cache(maxsize=256)
def _names_in_code(layer: type) -> frozenset[str]:
    """The strings in the code of a layer's methods, keyword arguments of the calls in it among them."""
    found: set[str] = set()
    for base in layer.__mro__:
        if base is torch.nn.Module:
            break
        for method in vars(base).values():
            function = inspect.unwrap(method) if callable(method) else None
            if inspect.isfunction(function):
                found.update(_strings(function.__code__.co_consts))
    return frozenset(found)


def _strings(constants: Iterable[object]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from _strings(constant)
        elif isinstance(constant, CodeType):
            yield from _strings(constant.co_consts)


@lru_cache(maxsize=256)
def _reads(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters

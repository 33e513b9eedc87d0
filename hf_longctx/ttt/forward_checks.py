"""What a forward of a TTT model cannot take: refused by name, with the value seen and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ..adapters.instance_forward import patch_on
from ..adapters.tiled_mlp import TILED_MLP
from ..attention.cache_names import CACHE_NAMES
from ..parallel.segments import DOCUMENT_BOUND_KEYS
from .base_parts import BaseParts
from .fast_cache import TTTCache
from .prime import PrimeMLPs


_ONE_DOCUMENT = "fast weights would pass from one document into the next: give one document a row"
# What transformers and its trainers pass to every model and what changes no number here.
_IDLE = ("return_dict", "output_attentions", "output_hidden_states", "token_type_ids", "cache_position")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def validate_batch(given: Mapping[str, Any], input_ids: Any, attention_mask: Any) -> None:
    """Raise for a batch whose rows are not one document each, or for an argument that there is not."""
    if input_ids is None or given.get("inputs_embeds") is not None:
        raise NotImplementedError(
            "`inputs_embeds` cannot be read without `input_ids`: the inner loss learns from the tokens themselves; "
            "pass `input_ids`."
        )
    shard = given.get("sequence_shard")
    if shard is not None and shard.size > 1:
        raise NotImplementedError(
            f"the batch is a share of one of {shard.size} processes, but chunks are read one after the other: set "
            "`sequence_parallel_size` to 1 and use data parallelism."
        )
    bounds = [name for name in (*DOCUMENT_BOUND_KEYS, "sequence_shard") if given.get(name) is not None]
    if bounds:
        raise NotImplementedError(f"the batch packs documents (`{bounds[0]}`), and {_ONE_DOCUMENT}.")
    unknown = [name for name, value in given.items() if value is not None and name not in (*_IDLE, "inputs_embeds")]
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no argument that a TTT model takes: leave it out.")
    for name in ("output_attentions", "output_hidden_states"):
        if given.get(name):
            raise NotImplementedError(f"`{name}` is not collected from chunks: leave it out.")
    if given.get("return_dict") is False:
        raise NotImplementedError(
            "`return_dict` (False) asks for a tuple, and a TTT model returns its output by name: leave it out, and "
            "call `to_tuple()` on what is returned."
        )
    validate_mask(attention_mask)


def validate_positions(position_ids: Any, input_ids: torch.Tensor, begin: int = 0) -> None:
    """Raise for positions that are not those of one document, of which `begin` tokens were read before."""
    if position_ids is None:
        return
    if not isinstance(position_ids, torch.Tensor) or position_ids.shape[-1:] != input_ids.shape[1:]:
        seen = tuple(position_ids.shape) if isinstance(position_ids, torch.Tensor) else type(position_ids).__name__
        raise ValueError(
            f"`position_ids` ({seen}) must be a tensor with one position a token, as `input_ids` has "
            f"{input_ids.shape[1]} of: leave it out."
        )
    positions = torch.arange(begin, begin + input_ids.shape[1], device=position_ids.device)
    if not bool((position_ids == positions).all()):
        raise NotImplementedError(
            f"`position_ids` do not count up from {begin} in every row, as in packed rows, and {_ONE_DOCUMENT}, "
            "without `position_ids`."
        )


def validate_continuation(input_ids: torch.Tensor, attention_mask: Any, position_ids: Any, seen: int) -> None:
    """Raise for a batch that does not go on, token by token, from the `seen` ones that a cache holds."""
    lengths = (input_ids.shape[1], seen + input_ids.shape[1])
    if attention_mask is not None and (
        len(attention_mask) != len(input_ids) or attention_mask.shape[1] not in lengths
    ):
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `input_ids` {tuple(input_ids.shape)} "
            f"after {seen} tokens: leave it out."
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError(
            "`attention_mask` has padding, and a cache would remember it, and fast weights learn from it: read rows "
            "of one length, or each into a cache of its own."
        )
    validate_positions(position_ids, input_ids, seen)


def validate_learn(learn: Any, unset: bool | None = None) -> bool:
    """Whether steps are taken, or `ValueError` for anything but a bool; `unset` is what `None` stands for."""
    learn = unset if learn is None else learn
    if not isinstance(learn, bool):
        raise ValueError(f"`learn` ({learn!r}) must be True or False.")
    return learn


def validate_kept_logits(logits_to_keep: Any) -> None:
    """Raise `ValueError` unless it is a number of last tokens, or a tensor of places."""
    is_count = isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool) and logits_to_keep >= 0
    if not (is_count or (isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dim() == 1)):
        raise ValueError(
            f"`logits_to_keep` ({logits_to_keep!r}) must be how many last tokens have logits, 0 for all, or a tensor "
            "of their places."
        )


def find_one_cache(given: Mapping[str, Any]) -> Any:
    """The cache under any of its names, or `None`; `ValueError` for two."""
    found = [(name, given[name]) for name in CACHE_NAMES if given.get(name) is not None]
    if any(cache is not found[0][1] for _, cache in found):
        raise ValueError(
            f"`{found[0][0]}` and `{found[1][0]}` are two names of one argument, and two caches were given: pass the "
            "one to go on from."
        )
    if found and not isinstance(found[0][1], TTTCache):
        raise ValueError(
            f"`cache` is a `{type(found[0][1]).__name__}`, which has no place for fast weights: pass a `TTTCache`, as "
            "`model.read(...)` returns, or none."
        )
    return found[0][1] if found else None


def validate_shapes(input_ids: Any, least: int = 1, **others: Any) -> None:
    """Raise `ValueError` for tokens that are not `(B, T)`, or for others that do not say one thing of each token."""
    is_rows = isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2
    if not is_rows or input_ids.shape[1] < least or len(input_ids) == 0:
        seen = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(
            f"`input_ids` ({seen}) must be a tensor of rows, `(B, T)`, one or more, with {least} tokens or more each."
        )
    if input_ids.dtype not in _INTEGERS:
        raise ValueError(
            f"`input_ids` holds {input_ids.dtype}, and tokens are integers: give what a tokenizer returns."
        )
    for name, value in others.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.shape != input_ids.shape:
            seen = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"`{name}` has shape {seen}, but `input_ids` {tuple(input_ids.shape)}: give one value a token."
            )
        if "labels" in name and value.dtype not in _INTEGERS:
            raise ValueError(f"`{name}` holds {value.dtype}, and labels are tokens or -100: give integers.")


def validate_vocabulary(input_ids: torch.Tensor, size: int) -> None:
    """Raise `ValueError` for tokens that there are not; on a GPU, where looking would wait, the embedding does."""
    if input_ids.device.type != "cpu" or not input_ids.numel():
        return
    least, most = int(input_ids.min()), int(input_ids.max())
    if least < 0 or most >= size:
        raise ValueError(
            f"`input_ids` holds {least if least < 0 else most}, and tokens are from 0 to {size - 1}: give what the "
            "model's own tokenizer returns."
        )


def as_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Tokens or labels as the loss takes them: int64, and none of inference mode outside it."""
    if ids.is_inference() and not torch.is_inference_mode_enabled():
        ids = ids.clone()
    return ids.long()


def validate_mask(attention_mask: Any, any_side: bool = False) -> None:
    """Raise for what is no mask of padding, or unless `any_side` for padding that is not on the right."""
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"`attention_mask` is a `{type(attention_mask).__name__}`, and must be a tensor, `(B, T)`: pass the "
            "tokenizer's, or none."
        )
    if attention_mask.dim() != 2:
        raise NotImplementedError(
            f"`attention_mask` has {attention_mask.dim()} dimensions, and only padding on the right can be told from "
            "2 of them: pass the tokenizer's, or none."
        )
    if bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise ValueError(
            "`attention_mask` holds other values than 1 for tokens and 0 for padding, as masks that are added to "
            "scores do: pass the tokenizer's, or none."
        )
    if not any_side and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise NotImplementedError(
            "`attention_mask` begins with padding or has gaps, and fast weights would be learned from it: pad on the "
            "right (`tokenizer.padding_side = 'right'`), one document a row."
        )


def validate_lengths(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raise for a row that has no next token to learn from."""
    shortest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(1).min())
    if shortest < 2:
        raise ValueError(f"a row has {shortest} tokens, and a next token needs 2: leave such rows out.")


def validate_model(model: Any, parts: BaseParts, primes: PrimeMLPs) -> None:
    """Raise for wrappers and patches that would make a suffix inexact. Cheap: every forward calls it."""
    if any(hasattr(parameter, "ds_id") for parameter in primes.parameters()):
        raise NotImplementedError(
            "DeepSpeed ZeRO-3 gathers weights while a layer runs, and takes them away before the second gradient: use "
            "DDP, or FSDP2 with the whole model as one unit."
        )
    before = {module for layer in parts.prefix for module in layer.modules()}
    for name, module in model.named_modules():
        if module in before:
            continue
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise NotImplementedError(
                f"`{name or type(model).__name__}` is compiled, and `torch.compile` cannot trace the gradient of a "
                "gradient: leave it as it is; layers before the suffix may be compiled."
            )
        if module is model:
            continue
        if isinstance(module, FSDPModule):
            raise NotImplementedError(
                f"`{name}` is an FSDP2 unit of its own, and its weights are gone when the inner gradient is "
                "differentiated: wrap the whole model as one unit (`fully_shard(model)`, or "
                "`fsdp_auto_wrap_policy: NO_WRAP`); layers before the suffix may be units."
            )
        if patch_on(module, TILED_MLP) is not None:
            raise NotImplementedError(
                f"`{name}` is a tiled MLP, whose backward cannot be differentiated again: tile the layers before the "
                "suffix only, and use `gradient_checkpointing` for the suffix."
            )

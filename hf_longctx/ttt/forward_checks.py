"""What a forward of a TTT model cannot take: refused by name, with the value seen and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ..adapters.instance_forward import patch_on
from ..adapters.tiled_mlp import TILED_MLP
from ..parallel.segments import DOCUMENT_BOUND_KEYS
from .base_parts import BaseParts
from .prime import PrimeMLPs


_ONE_DOCUMENT = "fast weights would pass from one document into the next: give one document a row"
# What transformers and its trainers pass to every model and what changes no number here.
_IDLE = ("return_dict", "output_attentions", "output_hidden_states", "token_type_ids", "cache_position")


def validate_batch(given: Mapping[str, Any], input_ids: Any, attention_mask: Any, position_ids: Any) -> None:
    """Raise for a batch whose rows are not one document each, read from its first token on."""
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
        raise ValueError(f"`{unknown[0]}` is no argument of a TTT model's forward: leave it out.")
    for name in ("output_attentions", "output_hidden_states"):
        if given.get(name):
            raise NotImplementedError(f"`{name}` is not collected from chunks: leave it out.")
    validate_mask(attention_mask)
    if position_ids is not None and not _counts_up(position_ids):
        raise NotImplementedError(
            f"`position_ids` do not count up from 0 in every row, as in packed rows, and {_ONE_DOCUMENT}, without "
            "`position_ids`."
        )


def validate_shapes(input_ids: Any, least: int = 1, **others: torch.Tensor | None) -> None:
    """Raise `ValueError` for tokens that are not `(B, T)`, or for others that do not say one thing of each token."""
    is_rows = isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2
    if not is_rows or input_ids.shape[1] < least:
        seen = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids` ({seen}) must be a tensor of rows, `(B, T)`, with {least} tokens or more each.")
    for name, value in others.items():
        if value is not None and value.dim() == 2 and value.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}, but `input_ids` {tuple(input_ids.shape)}: give one value a "
                "token."
            )


def validate_mask(attention_mask: Any) -> None:
    """Raise for a mask of anything but right padding."""
    if attention_mask is None:
        return
    if attention_mask.dim() != 2:
        raise NotImplementedError(
            f"`attention_mask` has {attention_mask.dim()} dimensions, and only padding on the right can be told from "
            "2 of them: pass the tokenizer's, or none."
        )
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise NotImplementedError(
            "`attention_mask` begins with padding or has gaps, and fast weights would be learned from it: pad on the "
            "right (`tokenizer.padding_side = 'right'`), one document a row."
        )


def validate_lengths(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raise for a row that has no next token to learn from."""
    shortest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(1).min())
    if shortest < 2:
        raise ValueError(f"a row has {shortest} tokens, and a next token needs 2: leave such rows out.")


def validate_prompts(attention_mask: torch.Tensor | None) -> None:
    """Raise for prompts of unequal length."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError(
            "rows of unequal length in one `generate()` would learn from padding: call it once for each length, or "
            "for each row."
        )


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


def _counts_up(position_ids: torch.Tensor) -> bool:
    positions = torch.arange(position_ids.shape[-1], device=position_ids.device)
    return bool((position_ids == positions).all())

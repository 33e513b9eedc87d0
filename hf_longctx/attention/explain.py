"""Say which kernel attention runs on a batch and how documents reach it, in words.

The plan is made from device, precision, mask rule and document lengths, so it is read off a forward of the very batch,
not guessed from the configuration.
Price: one forward without gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..config.lsh_settings import LSHConfig
from ..families import position_axes
from ..parallel.segments import PAD_SEGMENT
from ..parallel.shard import SequenceShard, cut_batch
from ..tiny_check import whole_model
from .blocks import BlockPlan
from .kernels import is_flash
from .masks import AttentionRule, KernelPlan
from .registry import find_attention, name_that_packs
from .varlen import VarlenBounds


@dataclass(frozen=True)
class LayerPlan:
    """What the layers with one mask rule do with a batch.

    Args:
        kernel (`str`): the inner kernel.
        rule (`str`): which keys a token sees within its document.
        documents (`str`): how many, and their lengths.
        method (`str`): how the kernel is called.
        largest_mask (`int`): entries of the largest mask that is made, 0 for none.
    """

    kernel: str
    rule: str
    documents: str
    method: str
    largest_mask: int

    def __str__(self) -> str:
        return f"{self.rule}: {self.kernel}, {self.documents}: {self.method}"


@dataclass(frozen=True)
class AttentionExplanation:
    """One [`LayerPlan`] for each mask rule of the model, most layers sharing one. `str()` has a line for each."""

    plans: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.plans))


@torch.no_grad()
def explain_attention(model: torch.nn.Module, batch: Mapping[str, Any]) -> AttentionExplanation:
    """Say how `model` attends over `batch`.

    Args:
        model (`torch.nn.Module`): runs `"packed"` or `"ulysses"`, or another attention that plans an inner kernel.
        batch (`Mapping`): full rows, as for `model(**batch)`, or a rank's share from `shard_batch`.

    Raises:
        ValueError: the model runs an attention of transformers, or one that plans no inner kernel.

    Communication: none for full rows; that of a forward for a share, which every rank of the group must pass.
    """
    name = model.config.get_text_config()._attn_implementation
    if find_attention(name) is None:
        raise ValueError(
            f"`{type(model).__name__}` runs attn_implementation={name!r}, whose plan only transformers knows: call "
            f"`model.set_attn_implementation({name_that_packs()!r})`."
        )
    shard = batch.get("sequence_shard")
    if shard is None:
        batch = cut_batch(batch, 1, 0, position_axes=position_axes(model.config))
        shard = batch["sequence_shard"]
    inputs = {key: value for key, value in batch.items() if "labels" not in key and key != "num_items_in_batch"}
    if hasattr(model.config.get_text_config(), "use_cache"):
        inputs["use_cache"] = False
    with whole_model(model):
        model.base_model(**inputs)
    if not shard.kernel_plans and not shard.layer_plans:
        raise ValueError(
            f"`{type(model).__name__}` runs attn_implementation={name!r}, which plans no inner kernel, so there is "
            "nothing to explain: read its own function."
        )
    attention = (_describe(name[1], plan, shard) for name, plan in shard.kernel_plans.items())
    return AttentionExplanation((*attention, *(say() for say in shard.layer_plans.values())))


def note_selection(shard: SequenceShard, rule: str, numbers: float) -> None:
    """Keep for [`explain_attention`] which keys sparse layers meet, and how many numbers a token is sent.

    Args:
        shard ([`SequenceShard`]): of the batch.
        rule (`str`): in words.
        numbers (`float`): that are gathered from all ranks, for each token of the row.
    """
    travel = f", {round(numbers):,} numbers a token gathered from {shard.size:,} ranks" if shard.size > 1 else ""
    method = f"blocks of queries with their keys{travel}"
    say = lambda: LayerPlan("selected keys", rule, _documents_in_words(shard.segment_ids, shard), method, 0)
    shard.layer_plans.setdefault(rule, say)


def note_hashing(shard: SequenceShard, config: LSHConfig, causal: bool) -> None:
    """Keep for [`explain_attention`] what LSH attention does with these rows.

    Args:
        shard ([`SequenceShard`]): of the batch.
        config ([`LSHConfig`]): of the model.
        causal (`bool`): keys at or before the query.
    """
    direction = "causal" if causal else "bidirectional"
    seen = (
        f"chunks of {config.window:,} and the one before"
        if config.layout == "reformer"
        else (f"the {'last' if causal else 'nearest'} {config.window:,} tokens of a bucket")
    )
    rule = f"{direction}, {seen}"
    rounds = f"{config.num_hashes:,} round{'s' if config.num_hashes > 1 else ''} of {config.num_buckets:,} buckets"
    method = f"{rounds}, one at a time, no mask"
    say = lambda: LayerPlan("lsh", rule, _documents_in_words(shard.segment_ids, shard), method, 0)
    shard.layer_plans.setdefault(f"lsh, {rule}, {rounds}", say)


def _describe(kernel: str, plan: KernelPlan, shard: SequenceShard) -> LayerPlan:
    method, largest = _method(kernel, plan)
    return LayerPlan(kernel, _rule_in_words(plan.rule), _documents_in_words(plan.segments, shard), method, largest)


def _rule_in_words(rule: AttentionRule) -> str:
    direction = "causal" if rule.causal else "bidirectional"
    return direction if rule.window is None else f"{direction}, window of {rule.window:,} tokens"


def _documents_in_words(segments: torch.Tensor | None, shard: SequenceShard) -> str:
    if segments is None:
        return f"one document of {shard.num_tokens:,} tokens a row"
    lengths = []
    for row in segments:
        ids, counts = row.unique_consecutive(return_counts=True)
        lengths += counts[ids != PAD_SEGMENT].tolist()
    return f"{len(lengths):,} segments of {min(lengths):,} to {max(lengths):,} tokens"


def _method(kernel: str, plan: KernelPlan) -> tuple[str, int]:
    prepared = plan.prepared
    if isinstance(prepared, BlockPlan):
        masks = [call.mask.numel() for call in prepared.calls if call.mask is not None]
        count = f"{sum(len(call.queries) for call in prepared.calls):,} blocks in {len(prepared.calls):,} calls"
        largest = max(masks, default=prepared.numbers)
        if prepared.numbers:
            return f"{count}, largest mask {largest:,} entries a head", largest
        return f"{count}, " + (f"largest mask {largest:,} entries" if largest else "no mask"), largest
    if isinstance(prepared, VarlenBounds):
        return "one call of torch's variable-length flash kernel, no mask", 0
    if isinstance(prepared, torch.Tensor):
        return f"one call with a mask of {prepared.numel():,} entries", prepared.numel()
    if prepared is None:
        return "one call of the kernel's own path, no mask", 0
    return ("one call with flat bounds, no mask" if is_flash(kernel) else "one call with a block mask"), 0

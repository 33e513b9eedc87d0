"""Which keys a query may see, as rules, and what each kernel needs to obey them.

transformers describes a mask as nested index functions (causal, window, chunk, documents, padding), which only know
local indices under sharding. So the rule is read out of them and applied to the whole row. A rule that cannot be read
is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..parallel.segments import PAD_SEGMENT
from ..parallel.shard import SequenceShard


@dataclass(frozen=True)
class AttentionRule:
    """Which keys a query may see inside its own document.

    Args:
        causal (`bool`): keys at or before the query.
        window (`int`, *optional*): causal: the last `window` tokens, the query included. Otherwise: at most
            `window` tokens away on either side.
        chunk (`int`, *optional*): keys in the same block of `chunk` tokens, counted from the start of the document.
    """

    causal: bool = False
    window: int | None = None
    chunk: int | None = None


def read_rule(mask_function: Callable) -> AttentionRule:
    """Read one of transformers' nested mask functions.

    Documents and padding inside it are skipped: they hold local indices, and the shard knows both for the whole row.

    Raises:
        NotImplementedError: a part of it is not one of transformers' own rules, or the parts do not make one rule.
    """
    facts: dict[str, list[int]] = {"causal": [], "behind": [], "around": [], "chunk": []}
    _collect_facts(mask_function, facts)
    causal, behind, around, chunk = facts.values()
    if causal:
        windows = [*behind, *(distance + 1 for distance in around)]  # a causal window counts the query itself
    elif behind:
        raise NotImplementedError(
            f"this model looks {behind[0]} tokens back but also ahead, a rule that attn_implementation='ulysses' does "
            "not have: set `sequence_parallel_size` to 1."
        )
    else:
        windows = around
    if len(set(chunk)) > 1:
        raise NotImplementedError(
            f"this model intersects chunks of {sorted(set(chunk))} tokens, which attn_implementation='ulysses' does "
            "not support: set `sequence_parallel_size` to 1."
        )
    return AttentionRule(bool(causal), min(windows) if windows else None, chunk[0] if chunk else None)


def _collect_facts(mask_function: Callable, facts: dict[str, list[int]]) -> None:
    """Add what `mask_function` and the functions inside it demand, all at once, to `facts`."""
    module, name = getattr(mask_function, "__module__", None), getattr(mask_function, "__qualname__", None)
    ours = module == masking_utils.__name__ and name is not None
    maker = name.split(".")[0] if ours and name is not None else ""
    inside = inspect.getclosurevars(mask_function).nonlocals if ours else {}
    if mask_function is masking_utils.causal_mask_function:
        facts["causal"].append(1)
    elif maker == "and_masks":
        for part in inside["mask_functions"]:
            _collect_facts(part, facts)
    elif maker == "or_masks" and (only := _without_empty_blocks(inside["mask_functions"])) is not None:
        _collect_facts(only, facts)
    elif maker == "or_masks" and (distance := _opened_ahead(inside["mask_functions"])) is not None:
        facts["around"].extend([distance] if distance >= 0 else [])
    elif maker == "remap_positions_for_packed_sequence":
        _collect_facts(inside["mask_function"], facts)
    elif maker == "sliding_window_overlay":
        facts["behind"].append(inside["sliding_window"])
    elif maker == "sliding_window_bidirectional_overlay":
        facts["around"].append(inside["sliding_window"])
    elif maker == "chunked_overlay":
        facts["chunk"].append(inside["chunk_size"])
    elif maker not in ("bidirectional_mask_function", "packed_sequence_mask_function", "padding_mask_function"):
        raise NotImplementedError(
            f"this model masks attention with `{module}.{name or mask_function}`, a rule that "
            "attn_implementation='ulysses' cannot apply to a sharded row: set `sequence_parallel_size` to 1."
        )


def _without_empty_blocks(mask_functions: tuple[Callable, ...]) -> Callable | None:
    """The one function that is left when blocks (of an image) that this batch has none of are dropped, or `None`."""
    left = []
    for function in mask_functions:
        is_block = function.__module__ == masking_utils.__name__ and function.__qualname__.startswith("blockwise_over")
        ids = inspect.getclosurevars(function).nonlocals["block_sequence_ids"] if is_block else None
        if ids is None or bool((ids >= 0).any()):
            left.append(function)
    return left[0] if len(left) == 1 else None


def _always(*args):
    return torch.tensor(True, dtype=torch.bool)


def _opened_ahead(mask_functions: tuple[Callable, ...]) -> int | None:
    """The reach to both sides of a causal rule that a Gemma opens ahead for embeddings; -1 for all, `None` for others.

    Its models write `causal OR always` for full layers, and `causal within a window OR within it on either side`.
    """
    if len(mask_functions) != 2:
        return None
    behind, ahead = mask_functions
    module, name = getattr(ahead, "__module__", "") or "", getattr(ahead, "__qualname__", "")
    if not module.startswith("transformers.models."):
        return None
    facts: dict[str, list[int]] = {"causal": [], "behind": [], "around": [], "chunk": []}
    _collect_facts(behind, facts)
    if not facts["causal"] or facts["chunk"] or facts["around"]:
        return None
    code = getattr(ahead, "__code__", None)
    if code is not None and (code.co_code, code.co_names) == (_always.__code__.co_code, _always.__code__.co_names):
        return -1 if True in code.co_consts else None
    if name != "_bidirectional_window_overlay.<locals>.inner_mask":
        return None
    window = inspect.getclosurevars(ahead).nonlocals["sliding_window"]  # the query included
    return window - 1 if facts["behind"] and min(facts["behind"]) <= window else None


def packed_documents(mask_function: Callable) -> torch.Tensor | None:
    """The document of every token, `(B, T)`, as transformers read it from the positions; `None` if it is one a row."""
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    maker, inside = mask_function.__qualname__.split(".")[0], inspect.getclosurevars(mask_function).nonlocals
    if maker == "packed_sequence_mask_function":
        return inside["packed_sequence_mask"].to(torch.int32)
    found = (packed_documents(part) for part in inside.get("mask_functions", ()))
    return next((documents for documents in found if documents is not None), None)


@dataclass(frozen=True)
class KernelPlan:
    """A rule applied to the whole row: what is left for a kernel to obey.

    Args:
        rule ([`AttentionRule`]): with `chunk` gone, and `window` gone where it is longer than the row.
        segments (`torch.Tensor` of shape `(B, T)`, *optional*): tokens see their own segment only; `None`: the
            whole row.
        prepared (`object`, *optional*): what the kernel takes to obey it, made by
            [`plan_for_kernel`][hf_longctx.attention.kernels.plan_for_kernel].
    """

    rule: AttentionRule
    segments: torch.Tensor | None = None
    prepared: Any = None

    @property
    def is_plain(self) -> bool:
        """Nothing but causal or full attention over the whole row: every kernel has a fast path and needs no mask."""
        return self.segments is None and self.rule.window is None

    @property
    def has_padding(self) -> bool:
        return self.segments is not None and bool((self.segments == PAD_SEGMENT).any())


def plan_row(rule: AttentionRule, shard: SequenceShard, rows: int, device: torch.device) -> KernelPlan:
    """Apply `rule` to the rows of `shard`: chunks become segments, and what cannot matter is dropped."""
    num_tokens, segments = shard.num_tokens, shard.segment_ids
    if rule.causal and shard.only_right_padding:
        # Padding stands after every real token, so no real token looks at it, and nothing is computed from what it
        # sees.
        segments = None
    if segments is not None:
        segments = segments.to(device)
    if rule.chunk is not None and rule.chunk < num_tokens:
        segments = chunk_segments(segments, rule.chunk, rows, num_tokens, device)
    window = rule.window
    if window is not None and window >= num_tokens:
        window = None
    return KernelPlan(replace(rule, chunk=None, window=window), segments)


def chunk_segments(
    segments: torch.Tensor | None, chunk: int, rows: int, num_tokens: int, device: torch.device
) -> torch.Tensor:
    """Split every document into blocks of `chunk` tokens, counted from the document's start; padding stays whole."""
    index = torch.arange(num_tokens, device=device).expand(rows, -1)
    if segments is None:
        return (index // chunk).to(torch.int32)
    document = segments.long() + 1  # padding first
    first = torch.full((rows, int(document.max()) + 1), num_tokens, device=device)
    first.scatter_reduce_(1, document, index, "amin")  # the start, even of a document with a hole in it
    block = (index - first.gather(1, document)) // chunk
    width = num_tokens // chunk + 1
    return torch.where(segments == PAD_SEGMENT, segments, segments * width + block).to(torch.int32)


def index_function(plan: KernelPlan) -> Callable:
    """The plan as one of transformers' index functions `(row, head, query, key) -> bool`."""
    rule, segments = plan.rule, plan.segments
    parts = []
    if rule.causal:
        parts.append(masking_utils.causal_mask_function)
        if rule.window is not None:
            parts.append(masking_utils.sliding_window_overlay(rule.window))
    elif rule.window is not None:
        parts.append(masking_utils.sliding_window_bidirectional_overlay(rule.window))
    if segments is not None:
        parts.append(masking_utils.packed_sequence_mask_function(segments))
        # No token sees padding, not even padding: with left padding the last pad token predicts the first real one,
        # and in transformers it sees nothing.
        parts.append(masking_utils.padding_mask_function(segments != PAD_SEGMENT))
    return masking_utils.and_masks(*(parts or [masking_utils.bidirectional_mask_function]))


def build_mask(plan: KernelPlan, kernel: str, rows: int, num_tokens: int, dtype: torch.dtype, device: torch.device):
    """The mask object of `"sdpa"`, `"eager"` or `"flex_attention"` for a whole row, built by transformers."""
    return ALL_MASK_ATTENTION_FUNCTIONS[kernel](
        batch_size=rows,
        q_length=num_tokens,
        kv_length=num_tokens,
        q_offset=0,
        kv_offset=0,
        mask_function=index_function(plan),
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=device,
    )


def segment_bounds(segments: torch.Tensor | None, rows: int, num_tokens: int, device: torch.device):
    """Segments as the flat bounds of variable-length kernels.

    Returns:
        tuple of the cumulative lengths, 32-bit of shape `(segments + 1,)` over the `B * T` flattened tokens, and the
        longest.

    Raises:
        NotImplementedError: a segment is interrupted (a padding mask with holes).
    """
    if segments is None:
        bounds = torch.arange(0, (rows + 1) * num_tokens, num_tokens, dtype=torch.int32, device=device)
        return bounds, num_tokens
    changes = torch.nn.functional.pad(segments.diff(dim=1) != 0, (1, 0), value=True)
    runs = (changes & (segments != PAD_SEGMENT)).sum(dim=1).tolist()
    if runs != [len(row[row != PAD_SEGMENT].unique()) for row in segments]:
        raise NotImplementedError(
            "the `attention_mask` has holes inside a document, which a flash kernel cannot express: use "
            "`inner_attention='sdpa'`, or pad on the left or right only."
        )
    starts = changes.flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([rows * num_tokens])]).to(torch.int32)
    return bounds, int(bounds.diff().max())

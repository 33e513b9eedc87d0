"""Attention over rows that hold several documents: each document attends to itself, and nothing is `T x T`.

On one process. The bounds come with the batch (`cu_seq_lens_q`, `seq_idx` or positions that restart); one planner
decides from kernel, device, rule and lengths how the kernel is called: with flat bounds where it takes them, otherwise
document by document, those of equal length together. A row of one document is the inner kernel's own call, to the bit.
`"ulysses"` runs the same planner on whole rows of some heads.

Price: see [`blocks`][hf_longctx.attention.blocks]; bounds are read once per forward.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..parallel.segments import DOCUMENT_BOUND_KEYS, segment_rows
from ..parallel.shard import SequenceShard
from .deferred import DeferredMask
from .implicit_positions import validate_positions
from .kernels import choose_kernel, is_flash, plan_for_kernel, refuse_unsupported, run_plain, run_planned
from .masks import AttentionRule, KernelPlan, packed_documents, plan_row
from .padding_masks import without_padding_mask


# Keyword arguments that change the result and that no inner kernel can take on a part of the heads.
_REFUSED_EXTRAS = ("position_bias", "indices", "block_indices", "sinks", "cache", "head_mask")
_KNOWN_EXTRAS = ("sliding_window", "softcap", "s_aux")


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    sequence_shard: SequenceShard | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in which every token sees its own document only. Registered as `attn_implementation="packed"`.

    Args:
        module (`torch.nn.Module`): the attention layer; read, never changed.
        query (`torch.Tensor` of shape `(B, N, T, H)`): with rotary positions applied.
        key (`torch.Tensor` of shape `(B, K, T, H)`): `K` divides `N`.
        value (`torch.Tensor` of shape `(B, K, T, H_v)`).
        attention_mask ([`DeferredMask`], *optional*): the host's description of the mask.
        dropout (`float`): attention dropout; each call draws its own numbers.
        scaling (`float`, *optional*): score scale; defaults to `H ** -0.5`.
        is_causal (`bool`, *optional*): overrides `module.is_causal` where there is no mask.
        sequence_shard ([`SequenceShard`], *optional*): the facts of the batch, from a trainer or `shard_batch` with
            one rank a row. Otherwise they are read from the call: `cu_seq_lens_q` and `cu_seq_lens_k`, `seq_idx`, or
            `position_ids` that restart.

    Returns:
        tuple of `(B, T, N, H_v)`, and the kernel's weights for rows of one document or `None`.

    Raises:
        ValueError: bounds that do not describe the rows, a mask beside them, a cache beside them, or a batch that is
            shared by several processes.
        NotImplementedError: a mask or side input that the inner kernel would get wrong.

    Communication: none.
    Gradient: that of the documents taken one by one.
    """
    if sequence_shard is None:
        sequence_shard = _documents_of_call(module, query, key, attention_mask, kwargs)
    elif sequence_shard.size > 1:
        raise ValueError(
            f"`sequence_shard` is the share of one of {sequence_shard.size} processes, but the model runs "
            "attn_implementation='packed', which works on whole rows: call `model.set_attn_implementation('ulysses')`."
        )
    if sequence_shard is None:
        kernel = choose_kernel("auto", query, kwargs)
        if isinstance(attention_mask, DeferredMask):
            deferred, attention_mask = attention_mask, attention_mask.build(kernel)
            if attention_mask is None and is_causal is None and not hasattr(module, "is_causal"):
                is_causal = deferred.rule().causal  # a kernel that is told nothing takes it for causal
        extras = {**kwargs, "dropout": dropout, "scaling": scaling}
        if is_causal is not None:
            extras["is_causal"] = is_causal
        return run_plain(kernel, module, query, key, value, attention_mask, **extras)
    return _attend_documents(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, sequence_shard, kwargs
    )


@torch.compiler.disable
def _attend_documents(
    module, query, key, value, attention_mask, dropout, scaling, is_causal, shard: SequenceShard, kwargs: dict
) -> tuple[torch.Tensor, None]:
    """Rows of known documents. Not traced: every batch cuts its rows at other places."""
    attention_mask, is_causal = without_padding_mask(attention_mask, is_causal, shard, len(query))
    validate_call(module, query, key, attention_mask, shard, kwargs)
    return attend_rows(module, query, key, value, attention_mask, dropout, scaling, is_causal, shard, kwargs), None


def _documents_of_call(module, query, key, attention_mask, kwargs: dict[str, object]) -> SequenceShard | None:
    """The documents that this call packs, as the shard of one process, or `None` for rows of one document each."""
    bounds = {name: kwargs[name] for name in DOCUMENT_BOUND_KEYS if kwargs.get(name) is not None}
    if query.shape[2] != key.shape[2]:  # a cache or cross-attention: the bounds speak of other tokens
        if bounds:
            refuse_cache()
        return None
    if torch.compiler.is_compiling() and not bounds:
        return None  # the host describes documents in the mask itself then
    packs = getattr(getattr(module, "config", None), "_attn_implementation", None) == "packed"
    if isinstance(attention_mask, DeferredMask):
        return attention_mask.documents(lambda: _read_documents(packs, query, attention_mask, bounds, kwargs))
    return _read_documents(packs, query, None, bounds, kwargs)


@torch.compiler.disable
def _read_documents(
    packs: bool,
    query: torch.Tensor,
    mask: DeferredMask | None,
    bounds: dict[str, object],
    kwargs: dict[str, object],
) -> SequenceShard | None:
    """See [`_documents_of_call`]; `packs`: the user named `"packed"`, and so means to pack."""
    rows, _, num_tokens, _ = query.shape
    facts = dict(bounds)
    if mask is not None:
        facts["attention_mask"] = mask.padding
    positions = kwargs.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape[1] == num_tokens:
        facts["position_ids"] = positions
    segments, only_right_padding = segment_rows(facts, rows, num_tokens, query.device)
    if segments is None and mask is not None and mask.padding is None:
        segments = packed_documents(mask.mask_function)
        only_right_padding = segments is None
    is_packed = bool(bounds) or (segments is not None and facts.get("attention_mask") is None)
    # A model that keeps its positions from attention shows documents in the mask alone, and a cache hides them there.
    is_hidden = packs and torch.is_grad_enabled() and "position_ids" not in kwargs
    is_hidden = is_hidden and facts.get("attention_mask") is None
    if kwargs.get("use_cache") and (is_packed or is_hidden):
        refuse_cache()
    if not is_packed:
        return None
    return SequenceShard(
        size=1,
        rank=0,
        num_tokens=num_tokens,
        local_len=num_tokens,
        segment_ids=segments,
        only_right_padding=only_right_padding,
    )


def refuse_cache() -> None:
    """Raise `ValueError` for a cache beside packed documents."""
    raise ValueError(
        "`use_cache` is on for a batch that packs documents, or could without attention seeing it: a cache holds one "
        "document a row, and hides the others; pass `use_cache=False`, or set `model.config.use_cache = False`."
    )


def validate_call(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: object,
    shard: SequenceShard,
    extras: dict[str, object],
) -> None:
    """Refuse a call whose tokens are not those of the shard, or that brings what no part of the heads can take."""
    name = type(module).__name__
    if query.shape[2] != key.shape[2] or query.shape[2] != shard.local_len:
        raise NotImplementedError(
            f"`{name}` attends from {query.shape[2]} to {key.shape[2]} tokens, but this rank holds {shard.local_len}: "
            "cross-attention, key/value caches and virtual prompt tokens cannot be sharded; train without them, or "
            "set `sequence_parallel_size` to 1."
        )
    if attention_mask is not None and not isinstance(attention_mask, DeferredMask):
        raise NotImplementedError(
            f"`{name}` got a mask of {type(attention_mask).__name__} that the model made itself, which only knows "
            "this rank's tokens: set `sequence_parallel_size` to 1 for this model."
        )
    validate_positions(module, shard, extras)
    for key_name, extra in extras.items():
        bias_like = (
            isinstance(extra, torch.Tensor)
            and extra.dim() > 0
            and extra.is_floating_point()
            and key_name not in _KNOWN_EXTRAS
        )
        if extra is not None and (key_name in _REFUSED_EXTRAS or bias_like):
            raise NotImplementedError(
                f"`{name}` passes `{key_name}` to its attention, which cannot be split by heads yet: set "
                "`sequence_parallel_size` to 1 for this model."
            )


def attend_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: DeferredMask | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    shard: SequenceShard,
    extras: dict[str, object],
    heads: slice = slice(None),
) -> torch.Tensor:
    """Plan and run the kernel on whole rows of some heads.

    Args:
        query (`torch.Tensor` of shape `(B, n, T, H)`): `T` tokens of whole rows; `key`, `value`: `(B, k, T, H)`.
        shard ([`SequenceShard`]): documents and padding of the rows; keeps the plan for the other layers.
        extras (`dict`): the call's keyword arguments: `s_aux` of all heads, `softcap`, ...
        heads (`slice`): which of all heads these are.

    Returns:
        `torch.Tensor` of shape `(B, T, n, H_v)`.
    """
    kernel = choose_kernel(shard.inner_attention, query, extras)
    refuse_unsupported(kernel, extras, dropout)
    plan = _plan(module, query, key, value, attention_mask, dropout, is_causal, shard, kernel, extras)
    sinks = extras.get("s_aux")
    call = (plan, dropout, scaling, extras.get("softcap"), None if sinks is None else sinks[heads])
    if dropout:
        return _run_with_head_streams(heads.start or 0, kernel, module, query, key, value, *call)
    return run_planned(kernel, module, query, key, value, *call)


def _plan(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: DeferredMask | None,
    dropout: float,
    is_causal: bool | None,
    shard: SequenceShard,
    kernel: str,
    extras: dict[str, object],
) -> KernelPlan:
    """The rule of this call applied to the whole row, with the kernel's mask. Layers with the same rule share it."""
    if attention_mask is not None:
        rule = attention_mask.rule()
    else:
        rule = AttentionRule(causal=getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if is_flash(kernel) and extras.get("sliding_window") is not None and rule.window is None:
        raise NotImplementedError(
            f"`{type(module).__name__}` asks for a sliding window of {extras['sliding_window']} tokens that its mask "
            f"does not have, so '{kernel}' and 'sdpa' would disagree: use `inner_attention='sdpa'`."
        )
    sizes = query.shape[0], query.shape[-1], value.shape[-1]
    name = (rule, kernel, query.dtype, query.device, sizes, bool(dropout))
    if name not in shard.kernel_plans:
        plan = plan_row(rule, shard, query.shape[0], query.device)
        shard.kernel_plans[name] = replace(plan, prepared=plan_for_kernel(plan, kernel, query, key, value, dropout))
    return shard.kernel_plans[name]


def _run_with_head_streams(
    first_head: int,
    kernel: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: KernelPlan,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Run the kernel head by head, each with the random stream of its global index.

    One shared seed is drawn from the default generator, which checkpointing saves and restores. Drawing all heads from
    one stream instead would give the heads of different ranks the same dropout mask.
    """
    seed = int(torch.randint(2**62, (1,)))
    groups = query.shape[1] // key.shape[1]
    devices = [query.device] if query.device.type == "cuda" else []
    outputs = []
    for head in range(query.shape[1]):
        one, shared = slice(head, head + 1), slice(head // groups, head // groups + 1)
        sink = None if sinks is None else sinks[one]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed + first_head + head)
            tensors = (query[:, one], key[:, shared], value[:, shared])
            outputs.append(run_planned(kernel, module, *tensors, plan, dropout, scaling, softcap, sink))
    return torch.cat(outputs, dim=2)

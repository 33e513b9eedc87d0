"""Attention over rows that hold several documents: each document attends to itself, and nothing is `T x T`.

On one process. The bounds come with the batch (`cu_seq_lens_q`, `seq_idx` or positions that restart); one planner
decides from kernel, device, rule and lengths how the kernel is called: with flat bounds where it takes them, otherwise
document by document, those of equal length together. A row of one document is the inner kernel's own call, to the bit.
`"ulysses"` runs the same planner on whole rows of some heads.

Price: see [`blocks`][hf_longctx.attention.blocks]; bounds are read once per forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..config.lsh_settings import LSH
from ..parallel.shard import SequenceShard
from .call import AttentionCall, KeySelection
from .call_documents import documents_of_call, rows_of_call
from .deferred import DeferredMask, deferred_mask
from .distance_bias import NUMBERS, has_distance_bias, run_after_cache
from .implicit_positions import packs_documents, validate_positions
from .kernels import choose_kernel, is_flash, plan_for_kernel, refuse_unsupported, run_plain, run_planned
from .lsh import attend_lsh_rows, runs_lsh, shared_call
from .lsh_cache import attend_after_cache
from .masks import KernelPlan
from .open_blocks import read_text_mask
from .padding_masks import without_padding_mask
from .registry import AttentionEntry, name_that_packs, name_that_shards
from .side_inputs import refuse_added_keys, validate_side_inputs
from .unadapted import validate_unadapted


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
        attention_mask ([`DeferredMask`], *optional*): transformers' description of the mask.
        dropout (`float`): attention dropout; each call draws its own numbers.
        scaling (`float`, *optional*): score scale; defaults to `H ** -0.5`.
        is_causal (`bool`, *optional*): overrides `module.is_causal` where there is no mask.
        sequence_shard ([`SequenceShard`], *optional*): the facts of the batch, from a trainer or `shard_batch` with
            one rank a row. Otherwise they are read from the call: `cu_seq_lens_q` and `cu_seq_lens_k`, `seq_idx`, or
            `position_ids` that restart.

    Returns:
        tuple of `(B, T, N, H_v)`, and the kernel's weights for rows of one document or `None`.

    Raises:
        ValueError: bounds that do not describe the rows, a mask or a cache together with them, or a batch that is
            shared by several processes.
        NotImplementedError: a mask or side input that the inner kernel would get wrong.

    Communication: none.
    Gradient: that of the documents taken one by one.
    """
    call = PACKED.call(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if runs_lsh(call, sequence_shard):
        call = shared_call(call)
    return attend_documents(call, sequence_shard, attend_rows, run_inner_kernel)


PACKED = AttentionEntry(
    "packed",
    packed_attention,
    deferred_mask,
    packs_rows=True,
    per_head=("s_aux", *NUMBERS),
    takes=("dropout", "softcap"),
)


def attend_documents(
    call: AttentionCall, shard: SequenceShard | None, run: Callable, run_alone: Callable | None = None
) -> tuple[torch.Tensor, object]:
    """Attention over whole rows on one process, whatever says which documents they hold.

    Args:
        call ([`AttentionCall`]): all heads.
        shard ([`SequenceShard`], *optional*): the facts of the batch; otherwise they are read from the call.
        run (`Callable`): `(call, shard) -> output`: whole rows of some heads to `(B, T, n, H_v)`, in which every token
            sees what `call.plan(shard)` says.
        run_alone (`Callable`, *optional*): `call -> (output, weights)`: rows of one document each, which may have a
            cache or a mask of the model's own. Without it `run` gets them, and those two are refused.

    Returns:
        tuple of `(B, T, N, H_v)`, and weights or `None`.

    Raises:
        ValueError: bounds that do not describe the rows, a mask or a cache together with them, or a share of
            several processes.
        NotImplementedError: a mask or input that `run` would get wrong.
    """
    if shard is not None and isinstance(call.mask, KeySelection):
        return call.mask.attend(call, shard), None
    if shard is not None and shard.size > 1:
        raise ValueError(
            f"`sequence_shard` is the share of one of {shard.size} processes, but the model runs "
            f"attn_implementation={call.entry.name!r}, which works on whole rows: call "
            f"`model.set_attn_implementation({name_that_shards()!r})`."
        )
    refuse_added_keys(call)
    after_cache = call.query.shape[2] != call.key.shape[2]
    if shard is None and run_alone is not None and (after_cache or not has_distance_bias(call)):
        shard = documents_of_call(call)
        if shard is None:
            return run_alone(call)
    return _attend_documents(call, shard, run), None


@torch.compiler.disable
def _attend_documents(call: AttentionCall, shard: SequenceShard | None, run: Callable) -> torch.Tensor:
    """Rows of known documents. Not traced: every batch cuts its rows at other positions."""
    if shard is None:
        shard = documents_of_call(call) or rows_of_call(call)
    return run(validated(call, shard), shard)


def run_inner_kernel(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of one document each: the inner kernel as transformers runs it, on the mask that it would have built."""
    if runs_lsh(call, None):
        return run_lsh_alone(call)
    if has_distance_bias(call):  # which no kernel of transformers computes
        return run_after_cache(choose_kernel("auto", call), call), None
    kernel = choose_kernel("auto", call)
    mask, is_causal = call.mask, call.is_causal
    if isinstance(mask, DeferredMask):
        mask = mask.build(kernel)
        if mask is None and is_causal is None and not hasattr(call.module, "is_causal"):
            is_causal = call.rule().causal  # kernels default to causal
    return run_plain(kernel, call, mask, is_causal)


def run_lsh_alone(call: AttentionCall) -> tuple[torch.Tensor, None]:
    """Rows of one document each under LSH attention, after a cache or not."""
    # Without a cache there are no keys besides the queries.
    if call.key.shape[2] != call.query.shape[2]:
        return attend_after_cache(call), None
    return _attend_documents(call, None, attend_lsh_rows), None


def validated(call: AttentionCall, shard: SequenceShard) -> AttentionCall:
    """The call as whole rows of `shard` can be computed from it, without a mask that only repeats their padding.

    Raises:
        NotImplementedError: its tokens are not those of the shard, or it brings what its attention does not compute or
            what cannot be cut by heads.
        ValueError: a per-head input without one entry a head.
    """
    refuse_added_keys(call)
    mask, is_causal = without_padding_mask(call.mask, call.is_causal, shard, len(call.query))
    call = replace(call, mask=mask, is_causal=is_causal)
    name, tokens, keys = type(call.module).__name__, call.query.shape[2], call.key.shape[2]
    if tokens != keys or tokens != shard.local_len:
        raise NotImplementedError(
            f"`{name}` attends from {tokens} to {keys} tokens, but this rank holds {shard.local_len}: "
            "cross-attention, key/value caches and virtual prompt tokens cannot be sharded; train without them, or "
            "set `sequence_parallel_size` to 1."
        )
    if mask is not None and not isinstance(mask, DeferredMask):
        if shard.size == 1:
            raise NotImplementedError(
                f"`{name}` got a mask of {type(mask).__name__} that the model made itself, which does not keep the "
                "documents of a row apart: call `hf_longctx.adapt(model, mesh)` once after loading, or pad documents "
                "instead of packing them."
            )
        raise NotImplementedError(
            f"`{name}` got a mask of {type(mask).__name__} that the model made itself, which only knows "
            "this rank's tokens: set `sequence_parallel_size` to 1 for this model."
        )
    if not call.entry.packs_rows and packs_documents(shard):
        raise NotImplementedError(
            f"a row holds several documents, which attn_implementation={call.entry.name!r} does not keep apart: call "
            f"`model.set_attn_implementation({name_that_packs()!r})`, or pad documents instead of packing them."
        )
    validate_positions(call.module, shard, call.extras)
    validate_side_inputs(call, name)
    validate_unadapted(call.module, shard, call.extras)
    call = replace(call, mask=read_text_mask(call, shard))
    shard.readers.add(id(call.module))
    return call


def attend_rows(call: AttentionCall, shard: SequenceShard) -> torch.Tensor:
    """Plan and run an inner kernel on whole rows of some heads.

    Args:
        call ([`AttentionCall`]): `T` tokens of whole rows; `s_aux` and `softcap` are computed.
        shard ([`SequenceShard`]): documents and padding of the rows; keeps the plan for the other layers.

    Returns:
        `torch.Tensor` of shape `(B, T, n, H_v)`.
    """
    kernel = choose_kernel(shard.inner_attention, call)
    if kernel == LSH:
        return attend_lsh_rows(call, shard)
    refuse_unsupported(kernel, call)
    plan = _plan(call, shard, kernel)
    if call.dropout:
        return _run_with_head_streams(kernel, call, plan)
    return run_planned(kernel, call, plan)


def _plan(call: AttentionCall, shard: SequenceShard, kernel: str) -> KernelPlan:
    """The rule of this call applied to the whole row, with the kernel's mask. Layers with the same rule share it."""
    rule, query = call.rule(), call.query
    if is_flash(kernel) and call.extras.get("sliding_window") is not None and rule.window is None:
        raise NotImplementedError(
            f"`{type(call.module).__name__}` asks for a sliding window of {call.extras['sliding_window']} tokens that "
            f"its mask does not have, so '{kernel}' and 'sdpa' would disagree: use `inner_attention='sdpa'`."
        )
    sizes = query.shape[0], query.shape[-1], call.value.shape[-1]
    has_bias = has_distance_bias(call)
    name = (rule, kernel, query.dtype, query.device, sizes, bool(call.dropout), has_bias)
    if name not in shard.kernel_plans:
        plan = call.plan(shard)
        shard.kernel_plans[name] = replace(plan, prepared=plan_for_kernel(plan, kernel, call))
    return shard.kernel_plans[name]


def _run_with_head_streams(kernel: str, call: AttentionCall, plan: KernelPlan) -> torch.Tensor:
    """Run the kernel head by head, each with the random stream of its global index.

    One shared seed is drawn from the default generator, which checkpointing saves and restores. Drawing all heads from
    one stream instead would give the heads of different ranks the same dropout mask.
    """
    seed = int(torch.randint(2**62, (1,)))
    devices = [call.query.device] if call.query.device.type == "cuda" else []
    outputs = []
    for head in range(call.query.shape[1]):
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed + call.first_head + head)
            outputs.append(run_planned(kernel, call.of_heads(slice(head, head + 1)), plan))
    return torch.cat(outputs, dim=2)

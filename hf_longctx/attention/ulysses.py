"""Ulysses sequence parallelism: exchange tokens for heads around the model's own attention kernel.

Every rank holds some tokens of all heads. One all-to-all turns that into all tokens of some heads, on which any exact
kernel runs unchanged; a second one turns the output back. Without a `sequence_shard` the function is the inner kernel,
no more.

Price per layer and rank, forward: `(P-1)/P` of the query and output once, and each key/value head once to every rank
that reads it; the same again backward.
Source: DeepSpeed-Ulysses, https://huggingface.co/papers/2309.14509.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..parallel.collectives import heads_to_sequence, sequence_to_heads
from ..parallel.heads import split_heads
from ..parallel.shard import SequenceShard
from .kernels import choose_kernel, is_flash, plan_for_kernel, refuse_unsupported, run_plain, run_planned
from .masks import AttentionRule, DeferredMask, KernelPlan, plan_row


# Keyword arguments that change the result and that no inner kernel can take on a part of the heads.
_REFUSED_EXTRAS = ("position_bias", "indices", "block_indices", "sinks", "cache", "head_mask")
_KNOWN_EXTRAS = ("sliding_window", "softcap", "s_aux")


def ulysses_attention(
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
    """Attention over whole rows whose tokens live on several ranks. Registered as `attn_implementation="ulysses"`.

    Args:
        module (`torch.nn.Module`): the attention layer; read, never changed.
        query (`torch.Tensor` of shape `(B, N, t, H)`): my tokens, with rotary positions of the whole row applied.
        key (`torch.Tensor` of shape `(B, K, t, H)`): my tokens; `K` divides `N`.
        value (`torch.Tensor` of shape `(B, K, t, H_v)`): my tokens.
        attention_mask ([`DeferredMask`], *optional*): the host's description of the mask.
        dropout (`float`): attention dropout. Under a shard every global head draws from its own stream, so the
            result does not depend on `P`.
        scaling (`float`, *optional*): score scale; defaults to `H ** -0.5`.
        is_causal (`bool`, *optional*): overrides `module.is_causal` where there is no mask.
        sequence_shard ([`SequenceShard`], *optional*): the facts of the batch. `None`: behave exactly as the inner
        kernel.

    Returns:
        tuple of `(B, t, N, H_v)`, and the kernel's weights without a shard or `None` with one.

    Raises:
        ValueError: more ranks than query heads.
        NotImplementedError: a mask, side input or model feature that the inner kernel or the exchange would get wrong.

    Communication: two all-to-alls forward, two backward.
    Gradient: equal to the unsharded layer's, restricted to my tokens.
    """
    extras = {**kwargs, "dropout": dropout, "scaling": scaling}
    if sequence_shard is None:
        kernel = choose_kernel("auto", query, kwargs)
        if isinstance(attention_mask, DeferredMask):
            attention_mask = attention_mask.build(kernel)
        if is_causal is not None:
            extras["is_causal"] = is_causal
        return run_plain(kernel, module, query, key, value, attention_mask, **extras)

    return _sharded_attention(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, sequence_shard, kwargs
    )


@torch.compiler.disable
def _sharded_attention(
    module, query, key, value, attention_mask, dropout, scaling, is_causal, shard: SequenceShard, kwargs: dict
) -> tuple[torch.Tensor, None]:
    """The sharded half of [`ulysses_attention`]. Never traced: a compiler may lose the gradient of a collective."""
    _validate_call(module, query, key, attention_mask, shard, kwargs)
    kernel = choose_kernel(shard.inner_attention, query, kwargs)
    refuse_unsupported(kernel, kwargs, dropout)
    split = split_heads(query.shape[1], key.shape[1], shard.size)
    if shard.size > 1:
        if shard.group is None:
            raise RuntimeError(
                "`sequence_shard` is not bound to this process's group: call `batch['sequence_shard'].bind(mesh)` on "
                "a batch that a data worker cut, or use `hf_longctx.shard_batch`."
            )
        query, key, value = sequence_to_heads(query, key, value, split, shard.group)
    padding = shard.local_len * shard.size - shard.num_tokens
    if padding:
        # From here the row is the user's own again, so the kernel sees what one process would: the same lengths, the
        # same fast path without a mask, the same random numbers.
        query, key, value = (tensor[:, :, : shard.num_tokens] for tensor in (query, key, value))
    index = split.key_value_index(shard.rank)
    if index is not None:
        index = torch.tensor(index, device=key.device)
        key, value = key.index_select(1, index), value.index_select(1, index)

    plan = _plan(module, query, attention_mask, is_causal, shard, kernel, kwargs)
    heads = slice(*split.query[shard.rank])
    sinks = kwargs.get("s_aux")
    call = (plan, dropout, scaling, kwargs.get("softcap"), None if sinks is None else sinks[heads])
    if dropout:
        output = _run_with_head_streams(heads.start, kernel, module, query, key, value, *call)
    else:
        output = run_planned(kernel, module, query, key, value, *call)
    if padding:
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, padding))
    if shard.size > 1:
        output = heads_to_sequence(output, split, shard.group)
    return output, None


def _validate_call(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: object,
    shard: SequenceShard,
    extras: dict[str, object],
) -> None:
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


def _plan(
    module: torch.nn.Module,
    query: torch.Tensor,
    attention_mask: DeferredMask | None,
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
    key = (rule, kernel, query.dtype, query.device, query.shape[0])
    if key not in shard.kernel_plans:
        plan = plan_row(rule, shard, query.shape[0], query.device)
        shard.kernel_plans[key] = replace(plan, mask=plan_for_kernel(plan, kernel, query))
    return shard.kernel_plans[key]


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

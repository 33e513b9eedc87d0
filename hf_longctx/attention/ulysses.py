"""Ulysses sequence parallelism: exchange tokens for heads around the model's own attention kernel.

Every rank holds some tokens of all heads. One all-to-all turns that into all tokens of some heads, on which any exact
kernel runs unchanged; a second one turns the output back. Without a `sequence_shard` the function is `"packed"`.

Price per layer and rank, forward: `(P-1)/P` of the query and output once, and each key/value head once to every rank
that reads it; the same again backward.
Source: DeepSpeed-Ulysses, https://huggingface.co/papers/2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..parallel.collectives import heads_to_sequence, sequence_to_heads
from ..parallel.heads import split_heads
from ..parallel.shard import SequenceShard
from .call import AttentionCall, KeySelection
from .deferred import deferred_mask
from .distance_bias import NUMBERS
from .lsh import runs_lsh, shared_call
from .packed import attend_documents, attend_rows, run_inner_kernel, validated
from .registry import AttentionEntry
from .unadapted import refuse_dropped_shard


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
        attention_mask ([`DeferredMask`], *optional*): transformers' description of the mask.
        dropout (`float`): attention dropout. Under a shard every global head draws from its own stream, so the
            result does not depend on `P`.
        scaling (`float`, *optional*): score scale; defaults to `H ** -0.5`.
        is_causal (`bool`, *optional*): overrides `module.is_causal` where there is no mask.
        sequence_shard ([`SequenceShard`], *optional*): the facts of the batch. `None`: [`packed_attention`], which
            is exactly the inner kernel for a row of one document.

    Returns:
        tuple of `(B, t, N, H_v)`, and the kernel's weights without a shard or `None` with one.

    Raises:
        ValueError: more ranks than query heads.
        NotImplementedError: a mask, side input or model feature that the kernel or the all-to-all would get wrong.

    Communication: two all-to-alls forward, two backward.
    Gradient: equal to the unsharded layer's, restricted to my tokens.
    """
    call = ULYSSES.call(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if runs_lsh(call, sequence_shard):
        call = shared_call(call)
    return attend_sharded(call, sequence_shard, attend_rows, run_inner_kernel)


ULYSSES = AttentionEntry(
    "ulysses",
    ulysses_attention,
    deferred_mask,
    shards_rows=True,
    packs_rows=True,
    per_head=("s_aux", *NUMBERS),
    takes=("dropout", "softcap"),
)


def attend_sharded(
    call: AttentionCall, shard: SequenceShard | None, run: Callable, run_alone: Callable | None = None
) -> tuple[torch.Tensor, object]:
    """Attention over whole rows, wherever their tokens live: the body of any attention function.

    Args:
        call ([`AttentionCall`]): my tokens of all heads.
        shard ([`SequenceShard`], *optional*): the facts of the batch; otherwise they are read from the call.
        run (`Callable`): `(call, shard) -> output`: whole rows of some heads to `(B, T, n, H_v)`, in which every token
            sees what `call.plan(shard)` says. Its call holds these heads of everything, per-head inputs included; it
            knows nothing of ranks.
        run_alone (`Callable`, *optional*): without a shard, `call -> (output, weights)`; see [`attend_documents`].

    Returns:
        tuple of `(B, t, N, H_v)`, and weights or `None`.

    Raises:
        ValueError: more ranks than query heads, a per-head input without one entry a head, or rows that do not fit
            their bounds.
        NotImplementedError: what `run` would get wrong, as the call's entry says, or what cannot be cut by heads.
        RuntimeError: the shard has no process group yet.

    Communication: two all-to-alls forward, two backward; none if one process holds the rows.
    Gradient: equal to the unsharded layer's, restricted to my tokens. A per-head input gets, on the rank that computes
        its heads, the gradient of all ranks' losses, and zero on the others: the wrapper's mean makes it exact.
    """
    if shard is not None and isinstance(call.mask, KeySelection):
        return call.mask.attend(call, shard), None
    if shard is None and call.entry.shards_rows:
        refuse_dropped_shard(call.module)
    if shard is None or shard.size == 1 or not call.entry.shards_rows:
        return attend_documents(call, shard, run, run_alone)
    return _sharded_attention(call, shard, run), None


@torch.compiler.disable
def _sharded_attention(call: AttentionCall, shard: SequenceShard, run: Callable) -> torch.Tensor:
    """The sharded half of [`attend_sharded`]. Never traced: a compiler may lose the gradient of a collective."""
    call = validated(call, shard)
    split = split_heads(call.query.shape[1], call.key.shape[1], shard.size)
    if shard.group is None:
        raise RuntimeError(
            "`sequence_shard` is not bound to this process's group: call `batch['sequence_shard'].bind(mesh)` on "
            "a batch that a data worker cut, or use `hf_longctx.shard_batch`."
        )
    query, key, value = sequence_to_heads(call.query, call.key, call.value, split, shard.group, shard.stopwatch)
    padding = shard.local_len * shard.size - shard.num_tokens
    if padding:
        # From here the row is the user's own again, so the kernel sees what one process would: the same lengths, the
        # same fast path without a mask, the same random numbers.
        query, key, value = (tensor[:, :, : shard.num_tokens] for tensor in (query, key, value))
    output = run(call.holding(slice(*split.query[shard.rank]), query, key, value), shard)
    if padding:
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, padding))
    return heads_to_sequence(output, split, shard.group, shard.stopwatch)

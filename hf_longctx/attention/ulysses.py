"""Ulysses sequence parallelism: exchange tokens for heads around the model's own attention kernel.

Every rank holds some tokens of all heads. One all-to-all turns that into all tokens of some heads, on which any exact
kernel runs unchanged; a second one turns the output back. Without a `sequence_shard` the function is `"packed"`.

Price per layer and rank, forward: `(P-1)/P` of the query and output once, and each key/value head once to every rank
that reads it; the same again backward.
Source: DeepSpeed-Ulysses, https://huggingface.co/papers/2309.14509.
"""

from __future__ import annotations

import torch

from ..parallel.collectives import heads_to_sequence, sequence_to_heads
from ..parallel.heads import split_heads
from ..parallel.shard import SequenceShard
from .packed import attend_rows, packed_attention, validate_call
from .padding_masks import without_padding_mask


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
        sequence_shard ([`SequenceShard`], *optional*): the facts of the batch. `None`: [`packed_attention`], which
            is exactly the inner kernel for a row of one document.

    Returns:
        tuple of `(B, t, N, H_v)`, and the kernel's weights without a shard or `None` with one.

    Raises:
        ValueError: more ranks than query heads.
        NotImplementedError: a mask, side input or model feature that the inner kernel or the exchange would get wrong.

    Communication: two all-to-alls forward, two backward.
    Gradient: equal to the unsharded layer's, restricted to my tokens.
    """
    if sequence_shard is None or sequence_shard.size == 1:
        return packed_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            is_causal,
            sequence_shard=sequence_shard,
            **kwargs,
        )
    return _sharded_attention(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, sequence_shard, kwargs
    )


@torch.compiler.disable
def _sharded_attention(
    module, query, key, value, attention_mask, dropout, scaling, is_causal, shard: SequenceShard, kwargs: dict
) -> tuple[torch.Tensor, None]:
    """The sharded half of [`ulysses_attention`]. Never traced: a compiler may lose the gradient of a collective."""
    attention_mask, is_causal = without_padding_mask(attention_mask, is_causal, shard, len(query))
    validate_call(module, query, key, attention_mask, shard, kwargs)
    split = split_heads(query.shape[1], key.shape[1], shard.size)
    if shard.group is None:
        raise RuntimeError(
            "`sequence_shard` is not bound to this process's group: call `batch['sequence_shard'].bind(mesh)` on "
            "a batch that a data worker cut, or use `hf_longctx.shard_batch`."
        )
    query, key, value = sequence_to_heads(query, key, value, split, shard.group, shard.stopwatch)
    padding = shard.local_len * shard.size - shard.num_tokens
    if padding:
        # From here the row is the user's own again, so the kernel sees what one process would: the same lengths, the
        # same fast path without a mask, the same random numbers.
        query, key, value = (tensor[:, :, : shard.num_tokens] for tensor in (query, key, value))
    index = split.key_value_index(shard.rank)
    if index is not None:
        index = torch.tensor(index, device=key.device)
        key, value = key.index_select(1, index), value.index_select(1, index)
    heads = slice(*split.query[shard.rank])
    output = attend_rows(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, shard, kwargs, heads=heads
    )
    if padding:
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, padding))
    return heads_to_sequence(output, split, shard.group, shard.stopwatch), None

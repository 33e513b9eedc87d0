"""`attn_implementation="lsh"`: LSH attention on whole rows, packed or not, on one process."""

from __future__ import annotations

import torch

from ..config.lsh_settings import LSH
from ..parallel.shard import SequenceShard
from .deferred import deferred_mask
from .lsh import attend_lsh_rows, shared_call
from .packed import attend_documents, run_lsh_alone
from .registry import AttentionEntry


def hashed_attention(
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
) -> tuple[torch.Tensor, object]:
    """LSH attention in which every token sees its own document only. Registered as `attn_implementation="lsh"`.

    Args:
        module (`torch.nn.Module`): the attention layer; its configuration has the settings, see
            [`use_lsh`][hf_longctx.use_lsh].
        query (`torch.Tensor` of shape `(B, N, T, H)`): with rotary positions applied.
        key (`torch.Tensor` of shape `(B, N, T, H)`): equal to the query, or a cache whose last tokens are.
        value (`torch.Tensor` of shape `(B, N, T, H_v)`).
        attention_mask ([`DeferredMask`], *optional*): transformers' description of the mask: causal or not, padding.
        dropout (`float`): of each weight in each round.
        scaling (`float`, *optional*): score scale; defaults to `H ** -0.5`. Keys are divided by their lengths.
        is_causal (`bool`, *optional*): overrides `module.is_causal` where there is no mask.
        sequence_shard ([`SequenceShard`], *optional*): the facts of the batch, with one rank a row.

    Returns:
        tuple of `(B, T, N, H_v)` and `None`.

    Raises:
        ValueError: keys that are not the queries, or the paper's layout with a cache.
        NotImplementedError: fewer key/value heads, or a mask or input that LSH attention does not compute.

    Communication: none.
    Gradient: that of the documents taken one by one.
    """
    call = HASHED.call(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    return attend_documents(shared_call(call), sequence_shard, attend_lsh_rows, run_lsh_alone)


HASHED = AttentionEntry(LSH, hashed_attention, deferred_mask, packs_rows=True, takes=("dropout",))

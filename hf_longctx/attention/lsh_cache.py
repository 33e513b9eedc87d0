"""LSH attention after a cache: new tokens see what they would see in a row of training.

Price: a new token is hashed and scored against all keys, as under full attention, and its bucket compared with theirs.
"""

from __future__ import annotations

import torch

from .call import AttentionCall
from .lsh import first_place, hashing_of, layer_of, rotations_of, scaling_of, settings_of
from .lsh_hashing import hash_tokens
from .lsh_kept import keep_buckets, kept_buckets
from .lsh_layouts import SELF_SCORE


# Numbers of a block of queries: rounds x rows x heads x queries x keys.
_NUMBERS_AT_ONCE = 2**22


def attend_after_cache(call: AttentionCall) -> torch.Tensor:
    """LSH attention of the last tokens of rows, one document each, to all keys of a cache.

    Buckets of keys are kept with the cache, see [`lsh_kept`][hf_longctx.attention.lsh_kept]. What a token sees is what
    it sees in training.

    Args:
        call ([`AttentionCall`]): all heads, from [`shared_call`]; the mask says which places its queries have.

    Returns:
        `torch.Tensor` of shape `(B, t, N, H_v)`.

    Raises:
        ValueError: the paper's layout, in which a new token changes what earlier ones see.
        NotImplementedError: dropout, or a mask that the model made itself.
    """
    config, query, mask = settings_of(call), call.query, call.mask
    if config.layout != "causal":
        raise ValueError(
            f"`layout` ({config.layout!r}) of the model's `LSHConfig` places tokens by those that come later, so "
            "nothing can be kept of them: pass `use_cache=False`, or train with `layout='causal'`."
        )
    own_mask = mask is not None and not hasattr(mask, "padding")
    if own_mask or call.dropout or not call.rule().causal:
        what = "dropout" if call.dropout else "a mask of its own" if own_mask else "keys that come later"
        raise NotImplementedError(
            f"`{type(call.module).__name__}` attends from {query.shape[2]} to {call.key.shape[2]} tokens with {what}, "
            "which LSH attention computes on whole rows only: pass `use_cache=False`."
        )
    start, tokens = first_place(call), query.shape[2]
    keys, values = call.key[:, :, : start + tokens], call.value[:, :, : start + tokens]
    buckets = _buckets_of(call, keys, start)
    lengths = (keys.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * keys.shape[-1] ** -0.5
    keys = keys * (lengths * scaling_of(call))
    padding = getattr(mask, "padding", None)
    real = None if padding is None else padding[:, : start + tokens].bool()
    count = max(1, _NUMBERS_AT_ONCE // max(buckets.numel(), 1))
    places = torch.arange(start, start + tokens, device=query.device).split(count)
    parts = zip(query.split(count, dim=2), places)
    outputs = [_attend_places(part, place, keys, values, buckets, config.window, real) for part, place in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _buckets_of(call: AttentionCall, keys: torch.Tensor, start: int) -> torch.Tensor:
    """Buckets of all keys up to the last query's, of which those before place `start` may be kept."""
    hashing = hashing_of(call)
    kept = kept_buckets(call.module, call.key, hashing)
    count = 0 if kept is None else min(start, kept.shape[-1])
    new = hash_tokens(keys[:, :, count:], rotations_of(settings_of(call), keys, layer_of(call), call.first_head))
    buckets = new if kept is None else torch.cat([kept[..., :count], new], dim=-1)
    keep_buckets(call.module, call.key, buckets, hashing)
    return buckets


def _attend_places(query, places, keys, values, buckets, window: int, real) -> torch.Tensor:
    """A block of queries, as softmax of a score plus the logarithm of how many rounds show the pair."""
    every = torch.arange(keys.shape[2], device=query.device)
    seen = (buckets[..., places, None] == buckets[..., None, :]) & (every <= places[:, None])
    if real is not None:
        mine = real[:, places, None] == real[:, None]
        seen &= mine[:, None]
    # How many tokens of the bucket come behind a key, up to the query.
    nearer = seen.flip(-1).cumsum(-1).flip(-1)
    counts = (seen & (nearer <= window)).sum(0)
    scores = query @ keys.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = torch.where(every == places[:, None], SELF_SCORE, scores)
    scores = (scores + counts.to(scores.dtype).log()).softmax(-1).to(values.dtype)
    output = scores @ values
    return output if real is None else output.masked_fill(~real[:, None, places, None], 0)

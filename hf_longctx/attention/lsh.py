"""LSH attention: a query sees tokens that hash into its bucket, in several rounds; keys are the queries themselves.

What: `attn_implementation="lsh"`, and `inner_attention="lsh"` under `"ulysses"` and `"packed"`. Settings are read from
the model's configuration ([`LSHConfig`][hf_longctx.config.LSHConfig]), since generation and a reloaded model have no
trainer that could carry them.

Price: `rounds x T x 2 window` scores, of which a piece exists at a time.
Source: Reformer, https://huggingface.co/papers/2001.04451; the causal layout is ours.
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Any, NoReturn

import torch

from ..config.lsh_settings import LSH, LSH_KEY, LSHConfig
from ..parallel.segments import PAD_SEGMENT
from ..parallel.shard import SequenceShard
from .call import AttentionCall, KeySelection
from .distance_bias import NUMBERS
from .drawn_dropout import draw_seed
from .explain import note_hashing
from .lsh_hashing import hash_tokens, rotations_for
from .lsh_kept import keep_whole_row, watch_cache
from .lsh_models import has_shared_weights, is_lsh_model, refuse_untied_parameters
from .lsh_rounds import Rounds, attend_rounds
from .lsh_tied import are_keys_queries


# What changes scores in a way that LSH attention does not compute, and what it is called.
_OTHER_INPUTS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "capped scores",
    "position_bias": "a bias of positions",
    "head_mask": "a mask of heads",
    "indices": "picked keys",
    "block_indices": "picked keys",
    **dict.fromkeys(NUMBERS, "numbers for distances (ALiBi)"),
}


def lsh_attention(
    query: torch.Tensor,
    value: torch.Tensor,
    *,
    num_hashes: int = 4,
    window: int = 64,
    num_buckets: int = 64,
    seed: int = 0,
    layout: str = "causal",
    causal: bool = True,
    segments: torch.Tensor | None = None,
    scaling: float | None = None,
    layer: int = 0,
    first_head: int = 0,
    rotations: torch.Tensor | None = None,
) -> torch.Tensor:
    """LSH attention without a model.

    Args:
        query (`torch.Tensor` of shape `(B, N, T, H)`): shared queries and keys; a key is divided by its length.
        value (`torch.Tensor` of shape `(B, N, T, H_v)`): one vector a token and head.
        num_hashes, window, num_buckets, layout: see [`LSHConfig`]; `seed` is its `hash_seed`.
        causal (`bool`, *optional*, defaults to `True`): a query sees nothing that is later.
        segments (`torch.Tensor` of shape `(B, T)`, *optional*): the document of every token, -1 for padding.
        scaling (`float`, *optional*): factor of scores; `H ** -0.5` if unset, as in most models. transformers'
            Reformer has 1.
        layer, first_head (`int`, *optional*, default to 0): which layer it is, and which of its heads is the first
            here; rotations are drawn for both.
        rotations (`torch.Tensor` of shape `(num_hashes, N, H, num_buckets / 2)`, *optional*): to use instead.

    Returns:
        `torch.Tensor` of shape `(B, T, N, H_v)`; zero for padding.

    Raises:
        ValueError: settings that no run could use, or shapes that do not go together.

    Communication: none. Gradient: exact, of query and value.
    """
    config = LSHConfig(num_hashes=num_hashes, window=window, num_buckets=num_buckets, hash_seed=seed, layout=layout)
    _validate_inputs(query, value, segments, rotations, scaling)
    heads, size = query.shape[1], query.shape[-1]
    if rotations is None:
        rotations = rotations_of(config, query, layer, first_head)
    elif rotations.shape != (num_hashes, heads, size, num_buckets // 2):
        raise ValueError(
            f"`rotations` has shape {tuple(rotations.shape)}, but {num_hashes} rounds of {num_buckets} buckets for "
            f"{heads} heads of {size} need {(num_hashes, heads, size, num_buckets // 2)}."
        )
    scaling = size**-0.5 if scaling is None else scaling
    buckets = hash_tokens(query, rotations)
    return _attend(query, value, buckets, Rounds(layout, window, causal, scaling, segments))


def _validate_inputs(query: Any, value: Any, segments: Any, rotations: Any, scaling: Any) -> None:
    for name, given in (("query", query), ("value", value), ("segments", segments), ("rotations", rotations)):
        if given is None and name in ("segments", "rotations"):
            continue
        floating = isinstance(given, torch.Tensor) and given.is_floating_point()
        if not isinstance(given, torch.Tensor) or floating is (name == "segments"):
            kind = f"tensor of {given.dtype}" if isinstance(given, torch.Tensor) else type(given).__name__
            wanted = "integers" if name == "segments" else "floating-point numbers"
            raise ValueError(f"`{name}` (a {kind}) must be a tensor of {wanted}.")
    if scaling is not None and (isinstance(scaling, bool) or not isinstance(scaling, (Real, torch.Tensor))):
        raise ValueError(f"`scaling` ({scaling!r}) must be a number: scores are multiplied by it.")
    if query.dim() != 4:
        raise ValueError(f"`query` {tuple(query.shape)} must have the shape (rows, heads, tokens, size of a head).")
    rows, _, tokens, _ = query.shape
    fits = value.dim() == 4 and value.shape[:3] == query.shape[:3]
    if not fits or (segments is not None and segments.shape != (rows, tokens)):
        raise ValueError(
            f"`value` {tuple(value.shape)} and `segments` {None if segments is None else tuple(segments.shape)} must "
            f"have the rows, heads and tokens of `query` {tuple(query.shape)}: repeat key/value heads first."
        )


def _attend(query: torch.Tensor, value: torch.Tensor, buckets: torch.Tensor, rounds: Rounds) -> torch.Tensor:
    output = attend_rounds(query, value, buckets, rounds)
    if rounds.segments is None:
        return output
    return output.masked_fill((rounds.segments.to(output.device) == PAD_SEGMENT)[..., None, None], 0)


def runs_lsh(call: AttentionCall, shard: SequenceShard | None) -> bool:
    """Whether a call of `"ulysses"` or `"packed"` is computed by LSH attention.

    Raises:
        ValueError: the model was trained with LSH attention, and the batch asks for another kernel.
    """
    if isinstance(call.mask, KeySelection):
        return False
    inner = "auto" if shard is None else shard.inner_attention
    if is_lsh_model(call.module) and inner not in ("auto", LSH):
        refuse_other_kernel(inner)
    return inner == LSH or is_lsh_model(call.module)


def refuse_other_kernel(inner_attention: str) -> NoReturn:
    """Raise `ValueError` for a kernel that is not what the configuration of a model says."""
    raise ValueError(
        f"`inner_attention` ({inner_attention!r}) is not the LSH attention that the model's configuration names "
        f"(`config.{LSH_KEY}`): leave it 'auto', or take LSH off with `hf_longctx.use_lsh(model, ...).remove()`."
    )


def settings_of(call: AttentionCall) -> LSHConfig:
    """The settings in the configuration of the model, or the defaults."""
    return LSHConfig.of_model(getattr(call.module, "config", None)) or LSHConfig()


def shared_call(call: AttentionCall) -> AttentionCall:
    """The call without its keys, which are its queries: what follows neither sends nor reads them.

    Raises:
        ValueError: they are not, or training would part them.
        NotImplementedError: there are fewer keys, an input that LSH attention does not compute, or a mask that is more
            than causality, documents and padding.
    """
    name = type(call.module).__name__
    for given in (*call.per_head, *call.extras):
        value = call.per_head.get(given, call.extras.get(given))
        if given in _OTHER_INPUTS and value is not None and value is not False:
            raise NotImplementedError(
                f"`{name}` passes {_OTHER_INPUTS[given]} (`{given}`) to its attention, which LSH attention does not "
                "compute: choose a model without them, or another attention."
            )
    rule = call.rule()
    if rule.window is not None or rule.chunk is not None:
        kind, size = ("a sliding window", rule.window) if rule.chunk is None else ("chunks", rule.chunk)
        raise NotImplementedError(
            f"`{name}` attends within {kind} of {size} tokens, and LSH attention knows causality, documents and "
            "padding only: set `sliding_window` (or `layer_types`) of the configuration so that all layers see the "
            "whole row, or choose another attention."
        )
    heads, keys = call.query.shape[1], call.key.shape[1]
    if heads != keys:
        raise NotImplementedError(
            f"`{name}` has {keys} key/value heads for {heads} query heads, so its keys cannot be its queries, as LSH "
            f"attention needs: build the model with `num_key_value_heads` {heads}."
        )
    refuse_untied_parameters(call.module)
    tokens = call.query.shape[2]
    start = first_place(call)
    if not are_keys_queries(call.module, call.query, call.key[:, :, start : start + tokens]):
        if has_shared_weights(call.module):
            raise NotImplementedError(
                f"`{name}` makes queries and keys with the same weights, but changes one of both afterwards (such as "
                "by a scale), so they differ, and LSH attention needs the same: choose a model such as Llama or Qwen."
            )
        raise ValueError(
            f"the keys of `{name}` are not its queries, which LSH attention hashes into the same buckets: call "
            "`hf_longctx.tie_query_key(model)` on a new model, and train it so."
        )
    watch_cache(call.module, call.key, tokens)
    return call if call.key.shape[2] != tokens else replace(call, key=call.query[..., :0].detach())


def first_place(call: AttentionCall) -> int:
    """Which of the keys is that of the first query, after a cache."""
    tokens, keys = call.query.shape[2], call.key.shape[2]
    if tokens == keys:
        return 0
    offset = getattr(call.mask, "offset", None)
    return keys - tokens if offset is None else int(offset)


def attend_lsh_rows(call: AttentionCall, shard: SequenceShard) -> torch.Tensor:
    """LSH attention on whole rows of some heads, each document on its own.

    Args:
        call ([`AttentionCall`]): from [`shared_call`]; dropout is computed.
        shard ([`SequenceShard`]): documents and padding of the rows.

    Returns:
        `torch.Tensor` of shape `(B, T, n, H_v)`.
    """
    config, rule, query = settings_of(call), call.rule(), call.query
    note_hashing(shard, config, rule.causal)
    rounds = Rounds(
        config.layout,
        config.window,
        rule.causal,
        scaling_of(call),
        shard.segment_ids,
        call.dropout,
        draw_seed() if call.dropout else 0,
        call.first_head,
    )
    buckets = hash_tokens(query, rotations_of(config, query, layer_of(call), call.first_head))
    keep_whole_row(call.module, buckets, hashing_of(call))
    return _attend(query, call.value, buckets, rounds)


def rotations_of(config: LSHConfig, query: torch.Tensor, layer: int, first_head: int) -> torch.Tensor:
    return rotations_for(query, config.hash_seed, layer, first_head, config.num_hashes, config.num_buckets)


def hashing_of(call: AttentionCall) -> tuple:
    """What buckets of the same vectors depend on."""
    config = settings_of(call)
    return config.hash_seed, config.num_hashes, config.num_buckets, layer_of(call), call.first_head


def layer_of(call: AttentionCall) -> int:
    index = getattr(call.module, "layer_idx", None)
    return index if isinstance(index, int) else 0


def scaling_of(call: AttentionCall) -> float:
    return call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling

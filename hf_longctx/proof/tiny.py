"""A tiny model of the same architecture: every size of a configuration made small, every kind of layer kept.

Sizes are recognised by the names of their fields, in the configuration and in those inside it. What a name does not
tell stands in [`hints`][hf_longctx.proof.hints], one line a model type. No weights are needed, and no network.
Price: milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..families import POSITION_STEPS, ROPE_THRESHOLD, ROPE_THRESHOLDS
from .hints import DERIVED, HINTS, lost_layer_kind
from .tiny_rope import HEAD_SIZE, THRESHOLD, rotates_by_length, scales_positions, shrink_rope


if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEADS = 4
VOCABULARY = 128
FIRST_TOKEN = 10  # of random text; the special tokens of a tiny model are below
MOST_LAYERS = 4
MOST_PARAMETERS = 8_000_000
_WINDOW = 6
_STEP = 5  # of a scale that changes every so many positions

_HEADS = re.compile(r"(num_|n_|(en|de)coder_|num_(en|de)coder_)?(attention_)?heads?(_count)?|n_head")
_KEY_VALUE_HEADS = re.compile(r"(\w+_)?(num_(key_value|kv)_heads|n_kv_heads|n_head_kv|kv_n_heads|num_key_value_heads)")
_LAYERS = re.compile(r"(num_hidden|num|n|(num_)?(en|de)coder|num_block)_layers?|num_blocks|depth")
_WIDTH = re.compile(
    r"(\w+_)?hidden_size|d_model|n_embd|dim|(\w+_)?embed(ding)?_dim|emb_dim|embedding_size|\w*embed_proj_dim|"
    r"hidden_dim|model_dim|projection_dim|proj_dim|lstm_hidden_size|lru_width|\w*out_hidden_size|d_embed|"
    r"adapter_((in|out)_dim|input_size)"
)
_MLP = re.compile(r"(\w+_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_ff|n_inner|d_inner|mlp_dim|ff_dim)")
_HEAD_SIZE = re.compile(r"(\w+_)?(head_dim|head_size|kv_channels|d_kv|d_head|head_dimension)")
_VOCABULARY = re.compile(r"(?!type_)(\w+_)?vocab_size(_\w+)?")
_EXPERTS = re.compile(r"(moe_)?(n|num)_(local_|routed_)?experts|moe_num_experts|n_routed_experts")
_EXPERTS_A_TOKEN = re.compile(r"(num_|moe_)?(experts_per_tok(en)?|top_?k(_experts)?)|moe_k|num_selected_experts")
_ONE = re.compile(
    r"n(um)?(_expert)?_group|topk_group|n_groups?_experts|(n|num)_shared_experts?|moe_num_shared_experts"
)
_WINDOWS = re.compile(r"(\w+_)?(sliding_window(_size)?|attention_window|local_attention|chunk_size|window_size)")
_RANKS = re.compile(r"(\w+_)?lora_rank|\w+_rank")
_POSITIONS = re.compile(r"(max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|max_target_positions)")
_DROPOUT = re.compile(r"\w*(drop(out)?(_?p(rob)?)?|pdrop|dropout\w*|layerdrop|jitter\w*)")
_TOKEN = re.compile(r"\w+_token_(id|index|idx)s?|\w+_token_ids?|pad_index|\w+_index")
_DENSE_LAYERS = re.compile(r"first_k_dense_replace|num_dense_layers|n_dense_layers|moe_layer_start_index")
_PERIOD = re.compile(r"\w*(_period|_step|every_n_layers|_interval|_pattern)")
_LAYER_INDICES = re.compile(r"\w*(layers|_idxs?|_ids|_indices|_indexes|_layer_ids)")


class CannotShrink(ValueError):
    """A configuration that has no tiny version; the message names the field."""


def shrink(config: PretrainedConfig, sequence_parallel_size: int = 2) -> PretrainedConfig:
    """The tiny version of `config`, with at least as many heads as ranks if it has them.

    Args:
        config (`PretrainedConfig`): of any size; not changed.
        sequence_parallel_size (`int`): ranks that will share the heads.

    Raises:
        CannotShrink: transformers rejects the small sizes, or some size stays large; the field is named.
    """
    tiny = _shrunk(config, sequence_parallel_size, 2)
    layers = 3
    while (lost := lost_layer_kind(config, tiny)) and layers <= 2 * MOST_LAYERS:
        # A pattern that repeats, not a list with one entry a layer: as many layers as it takes.
        tiny, layers = _shrunk(config, sequence_parallel_size, layers), layers + 1
    if lost:
        field, kind = lost
        raise CannotShrink(
            f"`{config.model_type}` cannot be made tiny at `{field}`: {2 * MOST_LAYERS} layers hold none of kind "
            f"{kind!r}, and a proof without it would not be one of this model; pass a configuration in which all "
            "kinds come early."
        )
    return tiny


def _shrunk(config: PretrainedConfig, size: int, least_layers: int) -> PretrainedConfig:
    values = shrink_values(config.to_dict(), size, least_layers)
    _add_hints(values, config.model_type)
    try:
        return type(config).from_dict(values)
    except Exception as error:  # transformers validates in its own ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        field = next((name for name in values if re.search(rf"\b{re.escape(name)}\b", str(error))), None)
        if field is None:
            name = type(error).__name__
            raise CannotShrink(f"`{config.model_type}` cannot be made tiny ({name}): {reason}") from error
        raise CannotShrink(f"`{config.model_type}` cannot be made tiny at `{field}`: {reason}") from error


def validate_tiny(config: PretrainedConfig, num_parameters: int) -> None:
    """Raise [`CannotShrink`] if a tiny model is not; the largest number of its configuration is named."""
    if num_parameters <= MOST_PARAMETERS:
        return
    field, value = max(_numbers(config.to_dict()), key=lambda item: item[1], default=("", 0))
    raise CannotShrink(
        f"`{config.model_type}` cannot be made tiny: it still has {num_parameters:,} parameters, and its largest "
        f"number is `{field}` ({value:,}), a field that is not known to be a size: pass a configuration in which it "
        "is small."
    )


def shrink_values(values: Mapping[str, Any], size: int, least_layers: int = 2) -> dict[str, Any]:
    """The fields of a configuration, with those of the configurations inside it, made small."""
    values = dict(values)
    heads = _first(values, _HEADS)
    most = max(HEADS, size)
    heads = min(heads, most) if heads else most  # without any, it may hold a configuration that has
    kept = _kept_layers(values, least_layers)
    facts = _Facts(heads, kept, _first(values, _LAYERS) or 0, _head_size(values))
    small: dict[str, Any] = {name: _shrink_field(name, value, values, facts) for name, value in values.items()}
    tokens = [name for name, value in small.items() if _TOKEN.fullmatch(name) and isinstance(value, int) and value > 0]
    for place, name in enumerate(tokens):
        if not isinstance(small[name], bool) and small[name] >= FIRST_TOKEN:
            small[name] = 3 + place % (FIRST_TOKEN - 3)
    return small


def _add_hints(values: dict[str, Any], model_type: str) -> None:
    """Set what is known of a type, and of the types of the configurations inside it."""
    for value in values.values():
        if isinstance(value, dict) and isinstance(value.get("model_type"), str):
            _add_hints(value, value["model_type"])
    _merge(values, HINTS.get(model_type, {}))


def _merge(values: dict, hints: Mapping) -> None:
    for name, value in hints.items():
        if value is DERIVED:
            values.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


class _Facts:
    """What the fields of one configuration share."""

    def __init__(self, heads: int, kept: list[int], layers: int, head_size: int) -> None:
        self.heads, self.kept, self.layers, self.head_size = heads, kept, layers, head_size
        self.width = heads * HEAD_SIZE


def _shrink_field(name: str, value: object, values: Mapping, facts: _Facts) -> object:
    if value is None:
        return {"head_dim": HEAD_SIZE, "num_key_value_heads": facts.heads}.get(name)
    if name == "per_layer_config" and isinstance(value, Mapping):
        kept = {facts.kept.index(int(key)): item for key, item in value.items() if int(key) in facts.kept}
        return {
            key: {n: _shrink_field(n, v, {**values, **item}, facts) for n, v in item.items()}
            for key, item in kept.items()
        }
    if name in POSITION_STEPS and isinstance(value, int):
        return min(value, _STEP)
    if name in (ROPE_THRESHOLD, *ROPE_THRESHOLDS) and isinstance(value, int) and rotates_by_length(values):
        return min(value, THRESHOLD) if name != ROPE_THRESHOLD or rotates_by_length(values, "dynamic") else value
    if isinstance(value, Mapping):
        if "rope" in name:
            return shrink_rope(value, facts.head_size)
        return shrink_values(value, facts.heads) if _is_config(value) else value
    if isinstance(value, (list, tuple)):
        return _shrink_list(name, value, facts)
    if _DROPOUT.fullmatch(name) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return type(value)(0)
    if isinstance(value, bool) or not isinstance(value, int):
        return HEAD_SIZE if name == "query_pre_attn_scalar" and value else value
    return _shrink_number(name, value, values, facts)


def _shrink_number(name: str, value: int, values: Mapping, facts: _Facts) -> int:
    if _KEY_VALUE_HEADS.fullmatch(name):
        everyone = value == _first(values, _HEADS)
        return facts.heads if everyone else min(value, 2 if facts.heads % 2 == 0 else 1)
    if _HEADS.fullmatch(name):
        return min(value, facts.heads)
    if _HEAD_SIZE.fullmatch(name):
        return _tiny_head_size(name, values)
    sizes = (
        (_LAYERS, len(facts.kept)),
        (_WIDTH, facts.width),
        (_MLP, facts.width),
        (_VOCABULARY, VOCABULARY),
        (_EXPERTS, 4),
        (_EXPERTS_A_TOKEN, 2),
        (_ONE, 1),
        (_WINDOWS, _WINDOW),
        (_RANKS, HEAD_SIZE),
        (_DENSE_LAYERS, 1),
        (_PERIOD, 2),
    )
    for pattern, size in sizes:
        if pattern.fullmatch(name):
            return min(value, size)
    if name in ("query_pre_attn_scalar", "rotary_dim"):
        return min(value, HEAD_SIZE)
    if _POSITIONS.fullmatch(name) and not scales_positions(values):
        return min(value, 256)
    return value


def _tiny_head_size(name: str, values: Mapping) -> int:
    """Half a head for the two parts of latent attention, whose values are of another size."""
    if "qk_rope_head_dim" in values:
        if name == "v_head_dim":
            return 12
        if name in ("qk_rope_head_dim", "qk_nope_head_dim"):
            return HEAD_SIZE // 2
        return HEAD_SIZE // 2 if values[name] == values["qk_rope_head_dim"] else HEAD_SIZE
    return HEAD_SIZE


def _shrink_list(name: str, value: list | tuple, facts: _Facts) -> list:
    if facts.layers and len(value) == facts.layers:
        value = [value[index] for index in facts.kept]
        return [_shrink_field(name, item, {}, facts) if type(item) is int else item for item in value]
    numbers = value and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    if numbers and _TOKEN.fullmatch(name):
        return [item if item < FIRST_TOKEN else 2 for item in value][:1]
    if numbers and _LAYER_INDICES.fullmatch(name):
        return [facts.kept.index(item) for item in value if item in facts.kept]
    return list(value)


def _kept_layers(values: Mapping, least: int = 2) -> list[int]:
    """Indices of the layers that stay: one of every kind that the lists with one entry a layer tell, and at least
    `least`."""
    layers = _first(values, _LAYERS) or 0
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and layers and len(v) == layers]
    kinds: dict[tuple, int] = {}
    for index in range(layers):
        kinds.setdefault(tuple(str(items[index]) for items in lists), index)
    kept = sorted(kinds.values())[:MOST_LAYERS]
    more = (index for index in range(layers) if index not in kept)
    while len(kept) < min(least, layers):
        kept.append(next(more))
    return sorted(kept)


def _is_config(value: Mapping) -> bool:
    """Whether a mapping inside a configuration is one itself: settings by name, many of them numbers."""
    return bool(value) and all(isinstance(name, str) for name in value)


def _head_size(values: Mapping) -> int:
    """Of the real model, for lists that are cut in proportion."""
    given = values.get("head_dim")
    heads, width = _first(values, _HEADS), _first(values, _WIDTH)
    return given or (width // heads if heads and width else HEAD_SIZE)


def _first(values: Mapping, pattern: re.Pattern) -> int | None:
    found = (v for k, v in values.items() if pattern.fullmatch(k) and isinstance(v, int) and not isinstance(v, bool))
    return next(found, None)


def _numbers(values: Mapping, prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield prefix + name, value


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """A copy whose dropout is 0: what is drawn on several ranks is not what one process draws."""
    return type(config).from_dict(_zero_dropout(config.to_dict()))


def _zero_dropout(values: Mapping) -> dict[str, object]:
    zeroed = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and _is_config(value):
            value = _zero_dropout(value)
        elif _DROPOUT.fullmatch(name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = type(value)(0)
        zeroed[name] = value
    return zeroed

"""Facts about model families that no module shows by itself: by model type, or by names of configuration fields.

Nothing else in the package lists model types. Every fact has a test that proves it on a tiny model
(`tests/unit/test_families.py`), so a version of transformers that changes one fails there first. The file is below all
rooms because attention and losses look facts up as well as adapters and trainers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


# Decoders that count their tokens from 0, whatever `position_ids` say.
COUNTS_POSITIONS = frozenset(
    {
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
        "trocr",
    }
)
# Models that number a row's tokens from `pad_token_id + 1` where they get no positions, skipping padding tokens.
COUNTS_FROM_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "mra",
        "nystromformer",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "yoso",
    }
)
# Axes of a multimodal rotary embedding: such a model takes `position_ids` of shape `(axes, rows, tokens)`, or one
# plane more, the first, with the positions of the text. `None`: as many as the configuration's rotary sections.
POSITION_AXES: dict[str, int | None] = {
    "cohere_compass_text": 3,
    "cosmos3_edge_text": 3,
    "ernie4_5_vl_moe_text": 3,
    "glm4v_moe_text": 3,
    "glm4v_text": 3,
    "glm_image_text": 3,
    "glm_ocr_text": 3,
    "hunyuan_vl_text": None,
    "hy_v4_vl_text": 3,
    "paddleocr_vl_text": 3,
    "qwen2_5_omni_text": 3,
    "qwen2_5_vl_text": 3,
    "qwen2_vl_text": 3,
    "qwen3_5_moe_text": 3,
    "qwen3_5_text": 3,
    "qwen3_omni_moe_text": 3,
    "qwen3_vl_moe_text": 3,
    "qwen3_vl_text": 3,
    "qwen4_exp_text": 3,
}
# ... of which these take no plane of the text, in some version of transformers that is supported.
NO_TEXT_PLANE = frozenset({"cosmos3_edge_text", "hunyuan_vl_text"})
# What a batch of text alone says of every token, where a model asks for it or reads another kind of token without it.
TEXT_MARKS: dict[str, tuple[str, int]] = {"molmo2": ("mm_token_type_ids", 0), "paligemma": ("token_type_ids", 1)}
# Models whose layers count windows or blocks of tokens from the first token of a row, padding included.
COUNTS_FROM_ROW_START = frozenset({"deepseek_v4", "minimax_m3_vl", "minimax_m3_vl_text"})
# Models that keep what a batch brings from their attention layers, which then never see a shard.
DROPS_SHARD = frozenset({"nemotron", "stablelm"})
# Causal language models whose own loss compares the logits of a token with the label of the same token.
UNSHIFTED_LABELS = COUNTS_POSITIONS | {"flaubert", "whisper", "xlm"}

# Models whose layers mix tokens in a way that no share of a row and no document can be kept to: what they do.
MIXES_TOKENS = {
    "convbert": "adds a convolution over neighbouring tokens to its attention",
    "cpmant": "puts prompt tokens in front of every row and attends by their distances",
    "deberta": "adds scores between contents and relative positions to its attention",
    "deberta-v2": "adds scores between contents and relative positions to its attention",
    "doge": "chooses the keys of its attention by numbers that each layer computes from its values",
    "fnet": "mixes the tokens of a row by a Fourier transform",
    "funnel": "pools the tokens of a row between its blocks",
    **dict.fromkeys(
        ("inkling_text", "inkling2_text", "inkling2_loop_text"),
        "adds a learned bias to its attention that each query makes of distances",
    ),
    "longformer": "attends in chunks of windows and through global tokens",
    "nystromformer": "attends through means over pieces of the row",
    "prophetnet": "predicts several tokens ahead by streams of their own, with relative positions",
    "reformer": "attends within buckets into which it hashes the tokens of a row",
    "sam3_lite_text_text_model": "stretches its positions over the row, and convolves and normalizes over all tokens",
    "xlnet": "adds scores between contents and relative positions to its attention",
    "yoso": "attends by sums over buckets into which it hashes the tokens of a row",
}
# ... or do with one value of a field: the field, the value, what they do, and a value without it.
MIXES_TOKENS_WITH = {
    "big_bird": ("attention_type", "block_sparse", "attends to blocks at random", "original_full"),
    "mobilebert": ("trigram_input", True, "embeds each token with its neighbours", False),
}

# Kinds of rotary embeddings whose frequencies depend on the largest position of a call.
LENGTH_ROPE_KINDS = ("dynamic", "longrope")
# Fields with the length from which on they change; that of the configuration, which most kinds only read when they are
# built; and the beginning of a field that scales queries by position from that length on.
ROPE_THRESHOLDS = ("original_max_position_embeddings",)
ROPE_THRESHOLD = "max_position_embeddings"
POSITION_SCALE = "llama_4_scaling"
# Fields with the number of positions after which a scale of queries changes, again and again.
POSITION_STEPS = ("floor_scale", "log_scaling_n_floor")
# A field that scales the embeddings of all tokens by how many of the row are masked.
ROW_COUNT_FIELD = "token_dropout"

# PEFT adapters whose effect on a token depends on other tokens of the batch: by kind, and by a field that turns it on.
ROW_ADAPTERS = {
    "LILY": "mixes its experts by their mean over the tokens of the batch",
    "POLY": "chooses its modules by one `task_ids` entry a row",
    "SHADOW": "runs a model of its own beside, over the tokens of the batch",
}
ROW_ADAPTER_FIELDS = {
    "is_prompt_learning": "puts virtual tokens in front of the tokens of the batch",
    "alora_invocation_tokens": "acts from the last place on at which a row holds these token ids",
    "velora_config": "compresses activations by a mean over the tokens of the batch",
}

# Kinds of layers, as in `config.layer_types`, whose whole reach over the sequence is attention that reads the shard.
SHARDED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "sparse")
# ... and kinds that look at one token at a time.
TOKEN_LAYERS = ("mlp", "moe")
# ... and kinds with a state along the sequence and no heads of attention; "hybrid" has both.
STATE_LAYERS = ("linear_attention", "conv")

# Fields that say how many experts a token is routed to.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")

# Fields by which a model in training skips a layer now and then.
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")

# Parts of the names under which a batch holds images, video or audio.
MULTIMODAL_INPUTS = (
    "pixel_",
    "image_grid",
    "video_grid",
    "input_features",
    "image_sizes",
    "input_values",
    "image_embeds",
    "image_features",
    "image_hidden_states",
    "mm_encoder_outputs",
    "deepstack_",
    "visual_",
    "audio_feature",
)

# Fields by which a model multiplies its logits, and the beginnings of the model types that do. One field may mean two
# things: `logits_scaling` divides in Granite and multiplies in HyperCLOVA X.
LOGITS_MULTIPLIERS: dict[str, tuple[str, ...]] = {
    "logit_scale": ("cohere",),
    "output_multiplier": ("muse_",),
    "lm_head_multiplier": ("falcon_h1",),
    "logits_scaling": ("hyperclovax",),
}
# ... by which it divides them; minicpm3 and inkling divide the hidden states, which is the same without a bias.
LOGITS_DIVISORS = {"logits_scaling": ("granite", "minicpm3"), "logits_mup_width_multiplier": ("inkling",)}


def counts_positions(config) -> bool:
    """Whether a model of this configuration is a decoder that counts its tokens itself."""
    return config.model_type in COUNTS_POSITIONS and not getattr(config, "is_encoder_decoder", False)


def token_mixing(config) -> str | None:
    """What a model of this configuration does across ranks and documents, with a remedy, or `None`."""
    text = config.get_text_config()
    field, value, effect, other = MIXES_TOKENS_WITH.get(text.model_type, (None, None, "", None))
    if field is not None and getattr(text, field, None) == value:
        return f"{effect} (`{field}` {value!r}), across ranks and documents: load it with `{field}={other!r}`, or"
    effect = MIXES_TOKENS.get(text.model_type, "")
    return f"{effect}, across ranks and documents:" if effect else None


def pads_left(config) -> bool:
    """Whether a model of this configuration takes rows that are padded on the left."""
    return config.get_text_config().model_type not in COUNTS_FROM_ROW_START


def skips_layers(config) -> bool:
    """Whether a model of this configuration runs without some of its layers in some steps."""
    return any(getattr(config.get_text_config(), name, None) for name in LAYER_DROPS)


def first_position(config) -> int:
    """The position that a model of this configuration gives to the first token of a text that brings none."""
    text = config.get_text_config()
    return (text.pad_token_id or 0) + 1 if text.model_type in COUNTS_FROM_PADDING else 0


def position_axes(config) -> int:
    """Axes of the rotary embedding of this configuration's text model, where `position_ids` may have a plane each.

    Returns:
        `int`: 0 for a model that takes `(rows, tokens)` only.
    """
    text = config.get_text_config()
    axes = POSITION_AXES.get(text.model_type, 0)
    return len((rope_settings(text) or [{}])[0].get("mrope_section") or ()) if axes is None else axes


def text_marks(config, tokens) -> dict[str, Any]:
    """What a batch of text alone brings for a model of this configuration next to its tokens, of their shape."""
    name, value = TEXT_MARKS.get(config.model_type, ("", 0))
    return {name: tokens.new_full(tokens.shape, value)} if name else {}


def expects_unshifted_labels(config) -> bool:
    """Whether the causal language model of this configuration compares each token with its own label.

    The decoders of encoder-decoders do: they are trained with labels that are shifted already, and a shard cuts them
    as they are. The trainers compare the loss on a tiny batch before the first step, so a wrong answer shows.
    """
    return config.model_type in UNSHIFTED_LABELS


def rope_settings(config) -> list[dict[str, Any]]:
    """The rotary settings of a configuration, one for each kind of layer that has its own."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, dict):
        return []
    inside = [value for value in rope.values() if isinstance(value, dict)]
    return inside or [rope]


def rope_kind(settings: Mapping[str, Any]) -> str:
    """The kind of rotary settings: `"default"`, `"yarn"`, ..."""
    return settings.get("rope_type", settings.get("type")) or "default"


def length_rope(config) -> tuple[str, int] | None:
    """The kind of rotary embedding of this configuration whose frequencies depend on a row's length, if it has one.

    Returns:
        tuple of the kind and the smallest length up to which all rows are rotated alike.
    """
    kinds = [(_threshold(config, item), rope_kind(item)) for item in rope_settings(config)]
    found = [(longest, kind) for longest, kind in kinds if kind in LENGTH_ROPE_KINDS]
    return None if not found else (min(found)[1], min(found)[0])


def length_thresholds(config) -> list[int]:
    """Positions of this configuration from which on a layer computes something else, in order."""
    settings = [
        item
        for item in rope_settings(config)
        if rope_kind(item) in LENGTH_ROPE_KINDS or any(name.startswith(POSITION_SCALE) for name in item)
    ]
    return sorted({_threshold(config, item) for item in settings} - {0})


def _threshold(config, settings: Mapping[str, Any]) -> int:
    named = None if rope_kind(settings) == "dynamic" else settings.get(ROPE_THRESHOLDS[0])
    return named or getattr(config, ROPE_THRESHOLD, None) or 0


def scales_by_count(layer) -> bool:
    """Whether an attention layer scales queries by positions that it counts itself: Llama 4 where nothing rotates."""
    fields = ("attn_temperature_tuning", "floor_scale", "attn_scale", "use_rope")
    return all(hasattr(layer, name) for name in fields) and bool(layer.attn_temperature_tuning) and not layer.use_rope


def values_of(config, name: str) -> list:
    """A field of a text model's configuration: one value, or that of each layer where layers have their own."""
    text = config.get_text_config()
    if name in (getattr(text, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) for layer in text.per_layer_config]
    return [getattr(text, name, None)]


def query_heads(config) -> int | None:
    """The heads of a model's attention layers, which ranks share out: of the layer with the fewest.

    Returns:
        `int`, or `None` if it has no such layers.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    heads = [count for count in values_of(config, "num_attention_heads") if isinstance(count, int)]
    has_attention = not kinds or any(kind not in (*TOKEN_LAYERS, *STATE_LAYERS) for kind in kinds)
    return min(heads) if has_attention and heads else None

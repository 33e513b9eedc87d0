"""Facts about model families that no module shows by itself: by model type, or by names of configuration fields.

Nothing else in the package lists model types. Every fact has a test that proves it on a tiny model
(`tests/unit/test_families.py`), so a version of transformers that changes one fails there first. The file is below all
rooms because attention and losses look facts up as well as adapters and trainers.
"""

from __future__ import annotations


# Decoders that count their tokens from 0, whatever `position_ids` say.
COUNTS_POSITIONS = frozenset(
    {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart"}
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
# Causal language models whose own loss compares the logits of a token with the label of the same token.
UNSHIFTED_LABELS = COUNTS_POSITIONS | {"whisper"}

# Kinds of layers, as in `config.layer_types`, whose whole reach over the sequence is attention that reads the shard.
SHARDED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "sparse")

# Fields that say how many experts a token is routed to.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")

# Fields by which a model in training skips a layer now and then.
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")

# Parts of the names under which a batch holds images, video or audio.
MULTIMODAL_INPUTS = ("pixel_values", "image_grid", "video_grid", "input_features", "image_sizes", "input_values")

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


def skips_layers(config) -> bool:
    """Whether a model of this configuration runs without some of its layers in some steps."""
    return any(getattr(config.get_text_config(), name, None) for name in LAYER_DROPS)


def expects_unshifted_labels(config) -> bool:
    """Whether the causal language model of this configuration compares each token with its own label.

    The decoders of encoder-decoders do: they are trained with labels that are shifted already, and a shard cuts them
    as they are. The trainers compare the loss on a tiny batch before the first step, so a wrong answer shows.
    """
    return config.model_type in UNSHIFTED_LABELS

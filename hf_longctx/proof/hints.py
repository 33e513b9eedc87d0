"""What the names of a configuration's fields do not tell: one line a model type, for its tiny version.

Fields are set as written after everything else was made small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PretrainedConfig

from typing import Any


# A field that the configuration computes from the others if it is not given.
DERIVED = object()

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
# Pairs of a head's numbers that turn with each axis.
_SECTIONS = {**_ROPE, "mrope_section": [3, 3, 2]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_SHARED_TRANSFORMER = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
# Of what turns an image into tokens.
_CODEBOOK = {"latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
# Fewer tokens than a row has, and heads enough that no score is 0 for all of them.
_PICKS_TOKENS = {"index_topk": 6, "index_n_heads": 16}
_PICKS_POOLS = {
    **_PICKS_TOKENS,
    "index_kpool": 2,
    "num_key_value_heads": 4,
    "num_attention_heads": 4,
    "qk_rope_head_dim": 0,
    "head_dim": 0,
    "linear_num_heads": 4,
}
# Heads of a recurrent layer, whose size follows from the width.
_STATE_HEADS = {"mamba_n_heads": 8, "mamba_d_head": "auto"}

# Types whose default configuration has layers of one kind, where released models have several: a proof of the type
# without them would not be one. Read where a type is named, never for a configuration that was given.
# Names repeat over all layers; numbers are those of the layers.
LAYER_KINDS: dict[str, dict[str, list[str] | list[int]]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    # Layers that attend to what the layer before them picked, and to the keys of an earlier one.
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "mistral_large4_text": {"indexer_types": ["full", "shared", "full", "full"], "kv_source_layers": [0, 0, 0, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
}

HINTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa"), _PICKS_TOKENS),
    **dict.fromkeys(("hy_v4", "mistral_large4_text"), _PICKS_TOKENS),
    "dots3_note": {"text_config": _PICKS_TOKENS},
    "glm5_next": {"text_config": _PICKS_POOLS},
    "glm5_next_text": _PICKS_POOLS,
    # Sizes that the default configuration leaves out and the model needs.
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _SECTIONS)},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 3,
        "index_n_heads": 16,
    },
    "minimax_m3_vl_text": {
        "index_block_size": 3,
        "index_topk_blocks": 2,
        "index_n_heads": 4,
        "num_key_value_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "step3p5": {"sliding_window": 6},
    "xmod": {"default_language": "en_XX"},
    # Parts beside the text model of a multimodal one, whose sizes have names of their own.
    "apertus1p5_vision_tokenizer": _CODEBOOK,
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "chameleon_vqgan": {**_CODEBOOK, "num_embeddings": 16},
    "deepseek_ocr2_encoder": {"head_dim": 16},
    "deepseek_ocr2_sam_vision_model": {"global_attn_indexes": [1]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}},
    "emu3_vqgan": {**_CODEBOOK, "codebook_size": 16},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0, 1], "downsample_rate": "4/8"},
    "janus_vision_model": {"num_image_tokens": 16},
    "janus_vqgan": {**_CODEBOOK, "num_embeddings": 16},
    "llama4_vision_model": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 64}},
    "muse_spark": {"projector_hidden_size": 64},
    "muse_spark_audio": {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 9},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 9},
    "sam_vision_model": {"global_attn_indexes": [1]},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "depths": [1, 1, 1, 1, 1, 1, 1]},
    "wavtokenizer_encoder": {"codebook_dim": 64, "codebook_size": 16},
    # Sizes that must fit each other.
    "bamba": _STATE_HEADS,
    # Every layer counts twice: attention, then MLP.
    "dory": {
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "mlp", "sliding_attention", "mlp", "full_attention", "mlp"]
        + ["sliding_attention", "mlp"],
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "falcon_h1": {**_STATE_HEADS, "mamba_d_ssm": None},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": _STATE_HEADS,
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lilt": {"hidden_size": 96, "channel_shrink_ratio": 2},
    "mamba2": {"expand": 2, "head_dim": 32, "n_groups": 1},
    "mobilebert": {"embedding_size": 64, "true_hidden_size": 64, "intra_bottleneck_size": 64, "use_bottleneck": False},
    # Rotary sections are pairs of a head's numbers: 8, or 4 and 2 where a half or a quarter of it rotates.
    "ernie4_5_vl_moe_text": {
        "rope_parameters": _SECTIONS,
        "moe_intermediate_size": [64, 64],
    },
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm4v_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    "glm_image_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    "glm_image_vqmodel": {"num_embeddings": 16},
    "glm_ocr_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "hy_v4_vl_text": {**_PICKS_TOKENS, "rope_parameters": {"mrope_section": [2, 1, 1]}},
    "paddleocr_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    "qwen2_5_omni_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    "qwen2_5_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    "qwen2_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    # Several layers share one transformer, and transformers looks for the second one.
    "zamba": {**_SHARED_TRANSFORMER, "attention_hidden_size": DERIVED, "attention_head_dim": DERIVED},
    "zamba2": {
        **_SHARED_TRANSFORMER,
        "attention_hidden_size": DERIVED,
        "attention_head_dim": DERIVED,
        "hybrid_layer_ids": DERIVED,
        "mamba_headdim": DERIVED,
    },
    "reformer": {"axial_pos_embds": False},
}


def lost_layer_kind(config: PretrainedConfig, tiny: PretrainedConfig) -> tuple[str, str] | None:
    """A field that tells the kinds of layers, and a kind that the tiny version has not; `None` if it has all."""
    for field in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
        ours, theirs = getattr(tiny, field, None), getattr(config, field, None)
        if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
            lost = sorted({str(kind) for kind in theirs} - {str(kind) for kind in ours})
            if lost:
                return field, lost[0]
    return None

"""Tiny random models, one per feature that attention must get right."""

from __future__ import annotations

import torch
import transformers as tf


VOCAB = 97
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(name: str, **changes):
    """The tiny config of a named case."""
    gpt2 = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 256, "vocab_size": VOCAB}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    encoder = {**_BASE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}
    mla = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 2,
        "num_key_value_heads": 6,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    decoder = {"vocab_size": VOCAB, "d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 6, "dropout": 0.0}
    decoder |= {"decoder_ffn_dim": 64, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2}
    cases = {
        "bart": (tf.BartConfig, decoder),
        "marian": (tf.MarianConfig, {**decoder, "decoder_start_token_id": 1}),
        "llama": (tf.LlamaConfig, _BASE),
        "lfm2": (
            tf.Lfm2Config,
            {**_BASE, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        ),
        "gpt2": (tf.GPT2Config, {**gpt2, **no_dropout}),
        "qwen3": (tf.Qwen3Config, {**_BASE, "head_dim": 8}),
        "mistral": (tf.MistralConfig, {**_BASE, "sliding_window": 5}),
        "gemma2": (tf.Gemma2Config, {**_BASE, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
        "gpt_oss": (
            tf.GptOssConfig,
            {**_BASE, **experts, "head_dim": 8, "sliding_window": 5, "rope_parameters": None},
        ),
        "llama4": (
            tf.Llama4TextConfig,
            {
                **_BASE,
                **experts,
                "head_dim": 8,
                "attention_chunk_size": 6,
                "intermediate_size_mlp": 64,
                "num_experts_per_tok": 1,
                "num_hidden_layers": 4,
                "interleave_moe_layer_step": 8,
            },
        ),
        "deepseek_v3": (tf.DeepseekV3Config, {**_BASE, **mla}),
        "bert": (tf.BertConfig, encoder),
        "modernbert": (
            tf.ModernBertConfig,
            {**_BASE, "local_attention": 6, "global_attn_every_n_layers": 2, "num_hidden_layers": 4},
        ),
    }
    kind, values = cases[name]
    values = {key: value for key, value in values.items() if value is not None}
    return kind(**{**values, **changes})


MASKED_LM = ("bert", "modernbert")
# Whose own loss compares a token with its own label, and averages over the tokens that it sees.
UNSHIFTED = ("bart", "marian")


def build(name: str, attention: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A model of the named case with weights that depend on the seed alone."""
    config = config_of(name, **changes)
    auto = tf.AutoModelForMaskedLM if name in MASKED_LM else tf.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation=attention).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation, so that attention is far from uniform and an error shows.
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.15
            parameter.copy_((1.0 if parameter.dim() == 1 else 0.0) + noise)
    return model

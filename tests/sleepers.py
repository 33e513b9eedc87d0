"""Tiny hybrids that sleep, transformers' own cache beside them, and the casts of its layers lifted."""

from __future__ import annotations

import contextlib

import torch
import transformers as tf
from transformers import DynamicCache

from hf_longctx import SleepConfig
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.sleep.loss import forward_rows
from hf_longctx.sleep.sleepers import check_sleeper

from .hybrids import VOCAB, build


_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4}
MAMBAS = {
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "mlp"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "conv_kernel": 4,
            "chunk_size": 16,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {**_MAMBA, "mamba_d_ssm": 64, "num_hidden_layers": 2, "mamba_chunk_size": 16, "embedding_multiplier": 3.0},
    ),
    "bamba": (
        "BambaConfig",
        {**_MAMBA, "num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_chunk_size": 16, "mamba_expand": 2},
    ),
    # Scales its inputs; a pass begins behind that.
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_MAMBA,
            "layer_types": ["linear_attention", "full_attention"],
            "num_hidden_layers": 2,
            "mamba_chunk_size": 16,
            "mamba_expand": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "embedding_multiplier": 12.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "position_embedding_type": "rope",
        },
    ),
}


def build_sleeper(name: str, attention: str = "sdpa", **changes):
    """A random model of this type."""
    if name not in MAMBAS:
        return build(name, attention, **changes)
    kind, values = MAMBAS[name]
    torch.manual_seed(0)
    dtype = changes.pop("dtype", torch.float32)
    config = getattr(tf, kind)(**{**_BASE, **values, **changes})
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def tokens_of(rows: int = 2, tokens: int = 26, labelled: int = 10) -> dict[str, torch.Tensor]:
    """Random rows, whose last tokens have labels."""
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : tokens - labelled] = -100
    return {"input_ids": ids, "labels": labels}


def logits_of(model, batch: dict, config: SleepConfig) -> torch.Tensor:
    """Of all tokens that a label follows; zeros elsewhere."""
    return forward_rows(check_sleeper(model, config), batch, config, keeps_logits=True)[0].logits


def with_own_cache(model, ids: torch.Tensor, window: int) -> torch.Tensor:
    """Logits of transformers' model with transformers' cache, whose keys are dropped at each border of windows."""
    cache, logits = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1], window):
        stop = min(start + window, ids.shape[1])
        positions = torch.arange(start, stop)[None]
        inputs = {"input_ids": ids[:, start:stop], "position_ids": positions, "use_cache": True, OUTPUT_NAME: cache}
        logits.append(model(**inputs).logits)
        for layer in cache.layers:
            if hasattr(layer, "keys"):
                layer.keys, layer.values, layer.is_initialized = None, None, False
    return torch.cat(logits, dim=1)


def randomize(model, scale: float = 0.1) -> None:
    """Weights under which each pass matters, and states that remember."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * scale
            if parameter.dim() > 1:
                parameter.copy_(noise)
            elif name.endswith("A_log"):
                parameter.fill_(-2.0).add_(noise)
            else:
                parameter.add_(noise)


@contextlib.contextmanager
def in_float64():
    """Casts to float32 inside of transformers' layers go to float64: differences of losses then have its digits."""
    to, as_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax
    lifted = lambda value: torch.float64 if value is torch.float32 else value

    def cast(self, *args, **kwargs):
        if self.dtype is torch.float64:
            args = tuple(lifted(value) for value in args)
            kwargs = {name: lifted(value) for name, value in kwargs.items()}
        return to(self, *args, **kwargs)

    torch.Tensor.to, torch.Tensor.float = cast, lambda self: cast(self, torch.float32)
    torch.nn.functional.softmax = lambda *args, **kwargs: softmax(
        *args, **{name: lifted(value) for name, value in kwargs.items()}
    )
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = to, as_float, softmax

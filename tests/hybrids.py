"""Tiny models with a delta rule next to attention, rows that are hard on a state, and the numbers of one process."""

from __future__ import annotations

import torch
import transformers as tf

from hf_longctx.proof.chunk_noise import other_chunks


VOCAB = 97
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "layer_types": ["linear_attention", "full_attention"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Four heads of values read two of keys.
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
_LINEAR |= {"linear_value_head_dim": 12, "linear_conv_kernel_dim": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32}
HYBRIDS = {
    "qwen3_next": ("Qwen3NextConfig", {**_LINEAR, **_EXPERTS}),
    "qwen3_5_text": ("Qwen3_5TextConfig", _LINEAR),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", {**_LINEAR, **_EXPERTS}),
    "olmo_hybrid": ("OlmoHybridConfig", {**_LINEAR, "linear_num_key_heads": 4}),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "mlp_layer_types": ["dense", "dense"],
            "head_dim": None,
        },
    ),
}


def build(name: str, attention: str = "ulysses", dtype: torch.dtype = torch.float32, **changes):
    """A random model of this type, the same on every rank."""
    kind, values = HYBRIDS[name]
    torch.manual_seed(0)
    values = {**_BASE, **values, **changes}
    config = getattr(tf, kind)(**{name: value for name, value in values.items() if value is not None})
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def rows_of(*lengths: int, rows: int = 2, left: int = 0) -> dict[str, torch.Tensor]:
    """Random rows, each with documents of these lengths; `left`: tokens of padding in the first row."""
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(3, VOCAB, (rows, sum(lengths)), generator=generator)}
    if left:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :left] = 0
    if len(lengths) > 1:
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    return batch


def upstream(batch: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random gradient for the logits of every real token."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(*batch["input_ids"].shape, VOCAB, generator=generator, dtype=dtype)
    return weights * batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of all parameters, which lose them."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def one_process(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Logits and gradients of transformers' own model, packed documents one by one."""
    weights = upstream(batch, model.dtype)
    positions = batch.get("position_ids")
    starts = [0] if positions is None else (positions[0] == 0).nonzero().flatten().tolist()
    bounds = list(zip(starts, [*starts[1:], batch["input_ids"].shape[1]]))
    inputs = {name: value for name, value in batch.items() if name != "position_ids"}
    pieces = [{name: value[:, slice(*bound)] for name, value in inputs.items()} for bound in bounds]
    logits = torch.cat([model(**piece, use_cache=False).logits for piece in pieces], dim=1)
    (logits * weights).sum().backward()
    return logits.detach() * (weights != 0), gradients(model)


def noise_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], expected: tuple[torch.Tensor, dict]) -> float:
    """How far transformers' own numbers move with chunks of another size."""
    with other_chunks(model) as has_chunks:
        assert has_chunks
        return worst(one_process(model, batch), expected)["worst"]


def worst(ours: tuple[torch.Tensor, dict], theirs: tuple[torch.Tensor, dict]) -> dict[str, float]:
    """By parameter, the largest difference relative to its largest entry; `logits` and the `worst` of all."""
    relative = lambda one, two: float((one - two).abs().max() / two.abs().max().clamp(min=1e-30))
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    found = {
        name: relative(ours[1][name], gradient)
        for name, gradient in theirs[1].items()
        if float(gradient.abs().max()) > 1e-3 * largest
    }
    return {"logits": relative(ours[0], theirs[0]), **found, "worst": max(found.values())}

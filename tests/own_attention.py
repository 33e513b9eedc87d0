"""Tiny models of every family with an attention of its own, and rows for them."""

from __future__ import annotations

import inspect

import torch
from transformers.models.auto import modeling_auto

from hf_longctx.families import first_position
from hf_longctx.proof.build import build_model
from hf_longctx.proof.model_under_test import ModelUnderTest, default_config


# By model type: fields that its default configuration leaves out.
FAMILIES = {
    "big_bird": {"attention_type": "original_full"},
    "bloom": {},
    "falcon": {},
    "flaubert": {},
    "gpt_neo": {},
    "gpt_neox_japanese": {},
    "ibert": {},
    "imagegpt": {"scale_attn_by_inverse_layer_idx": True},
    "lilt": {},
    "luke": {},
    "megatron-bert": {},
    "mpnet": {},
    "mpt": {},
    "mvp": {},
    "nemotron": {},
    "openai-gpt": {},
    "rembert": {},
    "roformer": {"rotary_value": True},
    "squeezebert": {"q_groups": 4},
    "stablelm": {},
    "tapas": {},
    "trocr": {},
    "visual_bert": {},
    "xglm": {},
    "xlm": {},
}
# The same types with other fields.
VARIANTS = {
    "megatron-bert decoder": ("megatron-bert", {"is_decoder": True}, "causal-lm"),
    "roformer decoder": ("roformer", {"is_decoder": True}, "causal-lm"),
    "trocr sinusoidal": ("trocr", {"use_learned_position_embeddings": False}, "causal-lm"),
    "xlm causal": ("xlm", {"causal": True}, "causal-lm"),
}
# By case: fields of the tiny model, such as numbers of heads that are no power of two.
SIX_HEADS = {"hidden_size": 96, "num_attention_heads": 6}
TINY = {
    "bloom, 6 heads": ("bloom", SIX_HEADS),
    "bloom, key form": ("bloom", {**SIX_HEADS, "alibi_form": "key"}),
    "falcon alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "falcon alibi, 6 heads, key form": ("falcon", {"alibi": True, **SIX_HEADS, "alibi_form": "key"}),
    "falcon, new architecture": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, many keys": ("falcon", {"multi_query": False}),
    "mpt, 6 heads, clipped": ("mpt", SIX_HEADS),
}
CASES = [*FAMILIES, *VARIANTS, *TINY]
# In float32, since transformers' own masks for these models overflow in float64: rounding of sums in another order.
TOLERANCE = 1e-5
TOKENS, LENGTHS = 11, (4, 1, 6)


def tested(case: str, size: int = 2) -> ModelUnderTest:
    """The tiny model of a case."""
    case, after = TINY.get(case, (case, {}))
    kind, fields, task = VARIANTS.get(case, (case, FAMILIES.get(case, {}), None))
    config = default_config(kind)
    for name, value in fields.items():
        setattr(config, name, value)
    tables = {
        "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    tables["masked-lm"] = {name for name in tables["masked-lm"] if name != "mvp"}  # an encoder-decoder
    task = task or next((task for task, names in tables.items() if kind in names), "encoder")
    tiny = ModelUnderTest.of(config, task, size)
    for name, value in after.items():
        setattr(tiny.config, name, value)
    if kind == "mpt" and after:
        tiny.config.attn_config.clip_qkv = 0.2
        tiny.config.attn_config.alibi_bias_max = 4  # which transformers does not read
    return tiny


def model_of(case: str, attention: str | None) -> torch.nn.Module:
    """With weights that depend on the case alone. Falcon adds its slopes twice under eager, once under sdpa."""
    attention = "sdpa" if attention == "eager" and case.startswith("falcon alibi") else attention
    return build_model(tested(case), attention, torch.float32).eval()


def rows_of(case: str, kind: str, config) -> dict[str, torch.Tensor]:
    """Two rows of random tokens: `dense`, padded on the `left`, or one `packed` row, with positions."""
    generator = torch.Generator().manual_seed(3)
    rows, first = 1 if kind == "packed" else 2, first_position(config)
    batch = {"input_ids": torch.randint(10, 100, (rows, TOKENS), generator=generator)}
    if kind == "packed":
        batch["position_ids"] = torch.cat([first + torch.arange(length) for length in LENGTHS])[None]
    elif first:
        batch["position_ids"] = (first + torch.arange(TOKENS)).expand(rows, -1)
    if kind == "left":
        batch["attention_mask"] = torch.ones(rows, TOKENS, dtype=torch.long)
        batch["attention_mask"][0, :3] = 0
    return batch


def forward(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """One vector a token, without a cache, and without positions where the model takes none."""
    names = inspect.signature(type(model).forward).parameters
    extras = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    takes = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    given = {name: value for name, value in {**batch, **extras}.items() if takes or name in names}
    return model(**given)[0]


def one_process(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """What transformers computes: documents of a packed row one by one."""
    names = inspect.signature(type(model).forward).parameters
    batch = {name: value for name, value in batch.items() if name in names}
    if len(batch["input_ids"]) == 2:
        return forward(model, batch)
    outputs, start = [], 0
    for length in LENGTHS:
        outputs.append(forward(model, {name: value[:, start : start + length] for name, value in batch.items()}))
        start += length
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def keeps_apart(model: torch.nn.Module) -> bool:
    """Whether a document of a packed row is the same next to another one."""
    batch = rows_of("openai-gpt", "packed", model.config)
    outputs = [forward(model, batch)]
    batch["input_ids"][:, : LENGTHS[0]] = 7
    outputs.append(forward(model, batch))
    return torch.equal(*(output[:, LENGTHS[0] :] for output in outputs))


def projection(batch: dict, width: int) -> torch.Tensor:
    """Random weights of the outputs of real tokens, `(B, T, D)`."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(*batch["input_ids"].shape, width, generator=generator)
    return weights * batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]


def gradients_of(model: torch.nn.Module, projected: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that has one; the model's are cleared before and after."""
    model.zero_grad()
    projected.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.numel()}
    model.zero_grad()
    return found


def difference(actual: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> float:
    largest = float(expected.abs().max()) if scale is None else scale
    return float((actual - expected).abs().max()) / max(largest, 1e-6)

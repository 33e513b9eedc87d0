"""Tiny models with every kind of sparse layer, rows for them, and what one process says of documents one by one."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from hf_longctx.proof.model_under_test import default_config
from hf_longctx.proof.tiny import shrink


ALL = (
    "deepseek_v32",
    "axk2",
    "glm_moe_dsa",
    "hy_v4",
    "mistral_large4_text",
    "dots3_note_text",
    "minimax_m3_vl_text",
    "glm5_next_text",
    "deepseek_v4",
)
# Those of them that the installed transformers has.
KINDS = [kind for kind in ALL if kind in CONFIG_MAPPING]
COUNTING = ("minimax_m3_vl_text", "deepseek_v4")  # windows or blocks of tokens, from the first one
# Norms, indexers and rotations compute in float32, whatever the weights are.
TOLERANCE = 1e-5
# hy_v4 mixes its streams in float32: half a unit of that in the weights moves its gradients by 3e-5 to 9e-5, and
# transformers' own packed row is 2.0e-5 off its documents one by one.
# So does glm5_next, for whose documents of one token the same change moves a scale of the streams by 2e-5 to 1.5e-4.
TOLERANCES = {"hy_v4": 1e-4, "glm5_next_text": 1e-4}
LENGTHS = (9, 1, 14, 3, 2, 20)
# Those whose indexers are trained in tests.
TRAINED = ("deepseek_v32", "glm_moe_dsa", "hy_v4", "deepseek_v4")


def build_sparse(kind: str, attention: str = "eager", dtype: torch.dtype = torch.float64, **settings: object):
    """A tiny model of a type, with weights that make attention uneven."""
    config = shrink(default_config(kind))
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    config._experts_implementation = "eager"  # grouped products have no double precision
    model = AutoModel.from_config(config, attn_implementation=attention).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.08 / config.initializer_range)
            elif "sinks" in name:
                parameter.uniform_(-1, 1)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # which experts a token id has, in checkpoints only
                buffer.copy_(torch.randint(config.n_routed_experts, buffer.shape))
    return model


def packed_row(lengths=LENGTHS, seed: int = 1) -> dict[str, torch.Tensor]:
    """Documents in one row, told by positions."""
    torch.manual_seed(seed)
    ids = torch.randint(10, 120, (1, sum(lengths)))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


def weights_of(num_tokens: int, width: int) -> torch.Tensor:
    """What outputs are weighted by, so that gradients tell them apart."""
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def backward(model, outputs: torch.Tensor, start: int = 0, whole: int | None = None) -> dict[str, torch.Tensor]:
    """Gradients of weighted outputs of the tokens from `start` on."""
    weights = weights_of(whole or outputs.shape[1], outputs.shape[-1])[start : start + outputs.shape[1]]
    (outputs[:, : len(weights)] * weights.to(outputs)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def one_by_one(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Outputs and gradients of transformers' own eager attention, document by document."""
    ids, starts = batch["input_ids"], (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    parts = [
        model(input_ids=ids[:, start:stop], use_cache=False)[0] for start, stop in zip(starts, [*starts[1:], None])
    ]
    outputs = torch.cat(parts, dim=1)
    return outputs.detach(), backward(model, outputs)


def assert_same(actual, expected, tolerance: float = TOLERANCE) -> None:
    """Outputs and gradients that differ by `tolerance` of the largest entry at most."""
    outputs, gradients = expected
    assert relative(actual[0], outputs) < tolerance
    assert set(gradients) <= set(actual[1]), set(gradients) - set(actual[1])
    # A gradient that is zero but for rounding, as of queries that see one key, is no measure of itself.
    floor = 1e-4 * max(gradient.abs().max() for gradient in gradients.values())
    worst = max((relative(actual[1][name], gradients[name], floor), name) for name in gradients)
    assert worst[0] < tolerance, worst


def relative(actual: torch.Tensor, expected: torch.Tensor, floor: float | torch.Tensor = 1e-12) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=floor)).item()


def build_trained(name: str, attention: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A causal model whose weights are large enough for attention and scores to be far from flat."""
    config = shrink(default_config(name))
    torch.manual_seed(seed)
    config._experts_implementation = "eager"  # grouped products have no double precision
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_((1.0 if parameter.dim() == 1 else 0.0) + noise)
    return model


def packed_rows(lengths: tuple[tuple[int, ...], ...] = ((9, 1, 13), (2, 18, 3))) -> dict[str, torch.Tensor]:
    """Rows of documents, with labels."""
    generator = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    ids = torch.randint(10, 128, positions.shape, generator=generator)
    labels = torch.where(positions == 0, -100, torch.randint(10, 128, positions.shape, generator=generator))
    return {"input_ids": ids, "position_ids": positions, "labels": labels}

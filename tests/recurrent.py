"""Tiny models with short convolutions, their rows, and the numbers of one process that they must get."""

from __future__ import annotations

import torch
import transformers as tf

from .models import VOCAB


# Lengths of documents, in rows of 23 tokens, 6 on each of 4 ranks: documents of one token, one that begins with a
# share (at 6 and at 12), one that spans three ranks.
PACKED = ((6, 1, 16), (2, 10, 11))


def build_hybrid(attention: str, kernel: int = 3, dtype: torch.dtype = torch.float64, **changes):
    """LFM2 with convolutions before and behind its attention; its weights depend on the settings alone."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "block_auto_adjust_ff_dim": False}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    kinds = {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": kernel, "conv_bias": True}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = tf.Lfm2Config(**{**sizes, **heads, **kinds, **tokens, **changes})
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_((1.0 if parameter.dim() == 1 and parameter.numel() != 32 else 0.0) + noise)
    return model.eval()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def packed_rows(*rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    return {"input_ids": draw(*positions.shape), "position_ids": positions}


def padded_rows(*masks: str) -> dict[str, torch.Tensor]:
    mask = torch.tensor([[int(bit) for bit in row] for row in masks])
    return {"input_ids": draw(*mask.shape), "attention_mask": mask}


def all_rows() -> dict[str, dict[str, torch.Tensor]]:
    """Rows of every kind, for 4 ranks."""
    return {
        "whole": {"input_ids": draw(2, 23)},
        "fill only on the last rank": {"input_ids": draw(2, 5)},
        "padded left and right": padded_rows("0" * 7 + "1" * 8, "1" * 13 + "00"),
        "one token a rank, padded": padded_rows("0011", "1110"),
        "packed": packed_rows(*PACKED),
        "packed, shares shorter than the kernel": packed_rows((1, 1, 2, 1)),
        "packed, a whole share of fill": packed_rows((2, 3), (5,)),
    }


def upstream(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A gradient for every logit of a token, 0 on padding."""
    shape = (*batch["input_ids"].shape, VOCAB)
    weights = torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return weights * batch.get("attention_mask", torch.ones(shape[:2]))[..., None]


def logits_alone(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of one process: transformers' own rows, and documents one by one."""
    if "position_ids" not in batch:
        return model(**batch, use_cache=False).logits
    rows = []
    for ids, positions in zip(batch["input_ids"], batch["position_ids"]):
        bounds = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        pieces = [model(input_ids=ids[None, a:b], use_cache=False).logits[0] for a, b in zip(bounds, bounds[1:])]
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


def gradients(model) -> dict[str, torch.Tensor]:
    """By name, and none left on the model."""
    found = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def numbers_alone(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one process."""
    weights = upstream(batch)
    logits = logits_alone(model, batch)
    (logits * weights).sum().backward()
    return logits.detach() * (weights != 0), gradients(model)


def worst(ours, theirs) -> float:
    """The largest difference of logits and gradients, relative to the largest of each."""
    (logits, found), (their_logits, expected) = ours, theirs
    assert set(found) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    errors = [float((found[name] - gradient).abs().max()) / largest for name, gradient in expected.items()]
    return max(float((logits - their_logits).abs().max() / their_logits.abs().max()), *errors)


def window_layer(hidden_states, conv_mask=None, reach: int = 3):
    """A layer that looks back in code of its own; what it takes to stand in front of a row is not 0."""
    masked = hidden_states if conv_mask is None else hidden_states * conv_mask[..., None]
    windows = torch.nn.functional.pad(masked, (0, 0, reach, 0), value=0.5).unfold(1, reach + 1, 1)
    return windows.prod(-1) + hidden_states, windows.sum(-1)

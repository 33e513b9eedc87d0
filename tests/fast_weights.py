"""Tiny models with fast weights, in float64 all the way through, and one training step of them."""

from __future__ import annotations

import torch
import transformers as tf

from hf_longctx import TTTConfig, TTTForCausalLM

from .models import VOCAB, config_of


def tiny_base(name: str = "llama", dtype: torch.dtype = torch.float64, layers: int = 3, attention="sdpa", **changes):
    """A base model; in float64 its norms and attention compute in float64, too."""
    torch.manual_seed(0)
    config = config_of(name, num_hidden_layers=layers, **changes)
    base = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if dtype == torch.float64:  # transformers' RMSNorm casts to float32
        for module in list(base.modules()):
            for child, norm in module.named_children():
                if "norm" in child and hasattr(norm, "weight"):
                    setattr(module, child, torch.nn.RMSNorm(norm.weight.shape, eps=config.rms_norm_eps))
    return base.to(dtype)


def tiny_ttt(dtype: torch.dtype = torch.float64, base=None, zero: bool = False, **settings) -> TTTForCausalLM:
    """A model of three layers, two of them with fast weights, that learns after every six tokens."""
    chosen = {"window": 8, "chunk_tokens": 6, "suffix_layers": 2, "fast_intermediate_size": 16}
    chosen |= {"suffix_attention": "sdpa" if dtype == torch.float64 else "eager", **settings}
    model = TTTForCausalLM.from_base(tiny_base(dtype=dtype) if base is None else base, TTTConfig(**chosen))
    torch.manual_seed(1)
    if not zero:
        with torch.no_grad():
            for matrix in model.primes.matrices():
                matrix.normal_(std=0.3)
    return model.eval()


def tokens(rows: int = 2, length: int = 29, seed: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, ids, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a training forward, and the gradient of every parameter."""
    model.train()
    model.zero_grad()
    loss = model(ids, labels=inputs.pop("labels", ids), **inputs).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of a gradient, of its largest entry."""
    assert found.keys() == expected.keys()
    errors = ((found[name] - expected[name]).abs().max() / expected[name].abs().max() for name in expected)
    return max(float(error) for error in errors)

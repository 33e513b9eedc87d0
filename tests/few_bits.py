"""QLoRA on tiny models: 4-bit weights by bitsandbytes, which also runs on a CPU, under LoRA weights with values."""

from __future__ import annotations

import torch

from .models import VOCAB, build


LENGTHS = (9, 1, 14, 5)  # 29 tokens: two ranks pad their row


def quantized(model, attention: str, storage: str = "uint8"):
    """The model with its linear layers in 4 bits but the head, as `load_in_4bit` makes it, computing in float32."""
    import bitsandbytes as bnb

    settings = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": getattr(torch, storage)}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            few = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, torch.float32, **settings
            )
            few.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=few, **settings)
            few.bias = layer.bias
            model.set_submodule(name, few.to(layer.weight.device))  # moving it is what quantizes
    model.is_loaded_in_4bit = True
    model.set_attn_implementation(attention)
    return model.requires_grad_(False)


def qlora(model, attention: str = "ulysses", storage: str = "uint8"):
    """Adapters on every layer, the last one too; both of their matrices have values."""
    from peft import LoraConfig, get_peft_model

    base = quantized(model, attention, storage)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, config)


def qlora_stock(model):
    return qlora(model, "sdpa")


def lora_gradients(model) -> dict[str, torch.Tensor]:
    """Whole gradients by names that no wrapper changes."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.removeprefix("module.")] = full.detach().clone()
    return found


def documents() -> list[torch.Tensor]:
    """Of very uneven lengths."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCAB, (1, length), generator=generator) for length in LENGTHS]


def one_by_one(device: str = "cpu") -> tuple[float, dict[str, torch.Tensor]]:
    """The reference: no packing, no sharding, the library's own attention and loss."""
    model = qlora(build("llama", "sdpa").to(device), "sdpa").to(device).train()
    predicted = sum(LENGTHS) - len(LENGTHS)
    total = 0.0
    for ids in documents():
        ids = ids.to(device)
        if ids.shape[1] > 1:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss * (ids.shape[1] - 1) / predicted
            loss.backward()
            total += float(loss.detach())
    return total, lora_gradients(model)


def packed_documents() -> dict[str, torch.Tensor]:
    """The same documents in one row."""
    rows = documents()
    batch = {"input_ids": torch.cat(rows, dim=1), "labels": torch.cat(rows, dim=1)}
    batch["position_ids"] = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    for bound in torch.tensor(LENGTHS).cumsum(0)[:-1]:
        batch["labels"][0, bound] = -100  # nothing predicts the first token of a document
    return batch

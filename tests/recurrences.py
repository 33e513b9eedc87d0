"""Tiny models with recurrent layers, rows of every kind, and their numbers on ranks and on one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_longctx import SequenceMesh, shard_batch
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.proof.model_under_test import read_config
from hf_longctx.proof.tiny import VOCABULARY, shrink


DOCUMENTS = (1, 9, 1, 21, 13)


def build(model_type: str, attention: str) -> PreTrainedModel:
    """A tiny model in training mode, whose biases and norms are not what they begin as."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(read_config(model_type)), attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def rows(kind: str, tokens: int) -> dict[str, torch.Tensor]:
    """Two rows: `dense`, padded on the `left` or the `right`, or `packed` with documents in another order each."""
    ids = torch.randint(10, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    batch = {"input_ids": ids}
    if kind in ("left", "right"):
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, slice(0, tokens // 3) if kind == "left" else slice(-(tokens // 3), None)] = 0
    if kind == "packed":
        orders = (DOCUMENTS, DOCUMENTS[::-1])
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in orders])
    return batch


def upstream(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A random gradient for the logits of every real token."""
    weights = torch.randn(*batch["input_ids"].shape, VOCABULARY, generator=torch.Generator().manual_seed(7))
    return weights * batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def on_one_process(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Logits and gradients of transformers' own model, of packed rows document by document."""
    if "position_ids" in batch:
        logits = torch.stack([torch.cat(_one_by_one(model, *pair)) for pair in zip(*batch.values())])
    else:
        logits = model(**batch, use_cache=False).logits
    (logits * upstream(batch)).sum().backward()
    return logits.detach(), gradients(model)


def _one_by_one(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    bounds = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    spans = [ids[None, start:stop] for start, stop in zip(bounds, bounds[1:])]
    return [model(input_ids=span, use_cache=False).logits[0] for span in spans]


def worst(ours: torch.Tensor, theirs: torch.Tensor, found: dict, expected: dict) -> tuple[float, str]:
    """The largest relative error of logits and gradients, and where it is; what is only rounding is left out."""
    assert found.keys() == expected.keys()
    errors = [((ours - theirs).abs().max() / theirs.abs().max(), "logits")]
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        if value.abs().max() > 1e-6 * largest:
            errors.append(((found[name] - value).abs().max() / value.abs().max(), name))
    error, name = max(errors, key=lambda item: item[0].nan_to_num(nan=torch.inf))
    return float(error), name


def noise(model: torch.nn.Module, batch: dict[str, torch.Tensor], expected: tuple[torch.Tensor, dict]) -> float:
    """How far one process is from itself with another chunk size: Mamba2 sums in float32, `A_log` over all tokens."""
    chunked = [module for module in model.modules() if hasattr(module, "chunk_size") and hasattr(module, "A_log")]
    before, errors = [module.chunk_size for module in chunked], [0.0]
    for size in (16, 32) if chunked else ():
        for module in chunked:
            module.chunk_size = size
        logits, found = on_one_process(model, batch)
        errors.append(worst(logits, expected[0], found, expected[1])[0])
    for module, size in zip(chunked, before):
        module.chunk_size = size
    return max(errors)


def errors_on_ranks(model_type: str, kinds: list[tuple[str, int]], size: int, checkpointed: bool = False) -> list:
    """Run on every rank: by batch, the worst error of `size` ranks that share its rows against one process.

    Returns:
        tuples of the kind of rows, their tokens, the noise of one process, the worst error and where it is.
    """
    mesh = SequenceMesh.build(size)
    ours, theirs, results = build(model_type, "ulysses"), build(model_type, "eager"), []
    attach_adapters(ours)
    if checkpointed:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for kind, tokens in kinds:
        batch = rows(kind, tokens)
        logits, expected = on_one_process(theirs, batch)
        rounding = noise(theirs, batch, (logits, expected))
        share = shard_batch(batch, mesh)
        shard = share["sequence_shard"]
        start, stop = shard.rank * shard.local_len, (shard.rank + 1) * shard.local_len
        missing = shard.local_len * size - tokens
        mine = torch.nn.functional.pad(upstream(batch), (0, 0, 0, missing))[:, start:stop]
        found = ours(**share, use_cache=False).logits
        (found * mine).sum().backward()
        local = gradients(ours)
        for gradient in local.values():
            dist.all_reduce(gradient, group=mesh.sp_group)
        real = mine.any(dim=-1, keepdim=True)
        whole = torch.nn.functional.pad(logits, (0, 0, 0, missing))[:, start:stop]
        results.append((kind, tokens, rounding, *worst(found.detach() * real, whole * real, local, expected)))
    return results

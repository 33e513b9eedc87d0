"""What every rank of the preference benchmark does: a step alone on the first rank, then together.

Started by `preference.py`: on the ranks of `hf-longctx verify`, or in its own process, where rows are only flattened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head
from ulysses_worker import Meter

from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.parallel import gathered
from hf_longctx.parallel.mesh import SequenceMesh
from hf_longctx.trainer.scored_rows import score_whole_rows
from hf_longctx.trainer.whole_rows import RowSharing, rows_shared


FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")
BETA = 0.1
ALONE, SHARED, FLATTENED, SHARED_FLATTENED = "one process", "shared", "one process, flattened", "shared, flattened"


def measure(settings: dict) -> list[dict]:
    """A row for each way and pair of lengths, from rank 0; the other ranks wait while it is alone."""
    torch.manual_seed(0)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    mesh, own = SequenceMesh.build(ranks), SequenceMesh(1, 1, 0, 0)
    policy, reference = (_model(settings) for _ in range(2))
    ways: dict[str, RowSharing | None] = {ALONE: None, FLATTENED: RowSharing(own, flatten=True)}
    if ranks > 1:
        ways |= {SHARED: RowSharing(mesh), SHARED_FLATTENED: RowSharing(mesh, flatten=True)}
    rows = []
    for shorter in settings["shorter"]:
        batch = _pair(settings, shorter)
        found: dict[str, list[dict]] = {way: [] for way in ways}
        for _ in range(settings["repeats"] + 1):
            for way, sharing in ways.items():
                is_shared = sharing is not None and sharing.mesh is mesh and ranks > 1
                torch.set_num_threads(1 if is_shared else settings["threads"] or ranks)
                _wait(ranks)
                if is_shared or mesh.sequence_parallel_rank == 0:
                    found[way].append(_step(policy, reference, batch, sharing, settings["device"], is_shared))
                _wait(ranks)
        real = int(batch["attention_mask"].sum())
        for way, runs in found.items():
            if runs:
                facts = {name: runs[-1][name] for name in ("loss", "norm", "activation_bytes", "gather_bytes")}
                row = {"lengths": f"1:{shorter}", "label": way, "real_tokens": real, **facts}
                rows.append({**row, "padded_tokens": batch["input_ids"].numel(), "runs": runs[1:]})
    return rows


def _wait(ranks: int) -> None:
    if ranks > 1:
        dist.barrier()


def _model(settings: dict) -> LlamaForCausalLM:
    dtype = getattr(torch, settings["dtype"])
    with torch.device(settings["device"]):
        config = LlamaConfig(**settings["config"])
        model = LlamaForCausalLM._from_config(config, attn_implementation="ulysses", dtype=dtype)
    add_fused_lm_head(model, outputs=FIELDS)
    attach_adapters(model)
    score_whole_rows(model)
    return model.eval()


def _pair(settings: dict, shorter: int) -> dict[str, torch.Tensor]:
    """Two rows, the first of which is `shorter` times as short."""
    tokens = settings["tokens"]
    ids = torch.randint(10, settings["config"]["vocab_size"], (2, tokens))
    mask = torch.ones_like(ids)
    mask[0, tokens // shorter :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : tokens // 8] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(settings["device"]) for name, value in batch.items()}


def _step(policy, reference, batch, sharing: RowSharing | None, device: str, is_shared: bool) -> dict:
    """Both forwards, the backward and the mean of gradients; CPU seconds are those of all ranks that took part."""
    context = contextlib.nullcontext() if sharing is None else rows_shared(sharing, policy, reference)
    meter, sent, kept = Meter(device), [], {}
    policy.zero_grad()
    meter.start()
    with context, _sent(sent), _kept(kept, policy):
        with torch.no_grad():
            expected = reference(**batch, fused_lm_head=True, use_cache=False).log_probs.sum(1)
        ratios = policy(**batch, fused_lm_head=True, use_cache=False).log_probs.sum(1) - expected
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1]))
        held = sum(kept.values())
        kept.clear()
        loss.backward()
    if is_shared:
        for parameter in policy.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    times = meter.stop()
    if is_shared:
        all_ranks = torch.tensor(times["cpu_seconds"])
        dist.all_reduce(all_ranks)
        times["cpu_seconds"] = float(all_ranks)
    norm = torch.stack([p.grad.double().norm() for p in policy.parameters()]).norm()
    numbers = {"loss": float(loss.detach()), "norm": float(norm), "activation_bytes": held, "gather_bytes": sum(sent)}
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {**times, **numbers, "device_name": name}


@contextlib.contextmanager
def _kept(found: dict[int, int], model) -> Iterator[None]:
    """By storage, the bytes that autograd keeps for the backward, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@contextlib.contextmanager
def _sent(found: list[int]) -> Iterator[None]:
    """The bytes that leave this rank for the numbers of whole rows."""
    own = gathered._GatherShares.apply

    def counting(local, group, stopwatch):
        others = 0 if group is None else dist.get_world_size(group) - 1  # all-gather, and reduce-scatter backward
        found.append((2 if local.requires_grad else 1) * others * local.numel() * local.element_size())
        return own(local, group, stopwatch)

    gathered._GatherShares.apply = counting
    try:
        yield
    finally:
        gathered._GatherShares.apply = own

"""What every rank of the preference benchmark does: a step alone on the first rank, then together.

Started by `preference.py` through the ranks of `hf-longctx verify`.
"""

from __future__ import annotations

import contextlib
import time

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.parallel import gathered
from hf_longctx.parallel.mesh import SequenceMesh
from hf_longctx.trainer.scored_rows import score_whole_rows
from hf_longctx.trainer.whole_rows import RowSharing, rows_shared


FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")
BETA = 0.1


def measure(settings: dict) -> dict:
    """Numbers of this rank: one process on rank 0 while the others wait, then all of them, padded and flattened."""
    torch.manual_seed(0)
    ranks, mesh = dist.get_world_size(), SequenceMesh.build(dist.get_world_size())
    policy, reference = (_model(settings, attention="ulysses") for _ in range(2))
    alone_mesh = SequenceMesh(1, 1, 0, 0)
    results: dict = {}
    for name, lengths in (("equal", (1, 1)), ("1:4", (1, 4))):
        batch = _pair(settings, lengths)
        ways = {"alone": (alone_mesh, False), "shared": (mesh, False), "flattened": (mesh, True)}
        times: dict = {way: [] for way in ways}
        losses, norms = {}, {}
        for _ in range(settings["repeats"] + 1):
            for way, (used, flatten) in ways.items():
                dist.barrier()
                if way == "alone" and dist.get_rank():
                    dist.barrier()
                    continue
                torch.set_num_threads(ranks if way == "alone" else 1)
                sharing = None if way == "alone" else RowSharing(used, flatten=flatten)
                seconds, loss, norm = _step(policy, reference, batch, sharing)
                times[way].append(seconds)
                losses[way], norms[way] = loss, norm
                if way == "alone":
                    dist.barrier()
        with _counted() as sent:
            _step(policy, reference, batch, RowSharing(mesh))
        times = {way: min(values[1:]) for way, values in times.items() if values}
        results[name] = {"seconds": times, "losses": losses, "norms": norms, "gather_bytes": sum(sent)}
        results[name]["real"] = int(batch["attention_mask"].sum())
        results[name]["padded"] = batch["attention_mask"].numel()
    return results


def _model(settings: dict, attention: str) -> LlamaForCausalLM:
    model = LlamaForCausalLM._from_config(LlamaConfig(**settings["config"]), attn_implementation=attention)
    add_fused_lm_head(model, outputs=FIELDS)
    attach_adapters(model)
    score_whole_rows(model)
    return model.eval()


def _pair(settings: dict, lengths: tuple[int, int]) -> dict[str, torch.Tensor]:
    tokens, longest = settings["tokens"], max(lengths)
    ids = torch.randint(10, settings["config"]["vocab_size"], (2, tokens))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, tokens * length // longest :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : tokens // 8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _step(policy, reference, batch, sharing: RowSharing | None) -> tuple[float, float, float]:
    context = contextlib.nullcontext() if sharing is None else rows_shared(sharing, policy, reference)
    policy.zero_grad()
    start = time.perf_counter()
    with context:
        with torch.no_grad():
            expected = reference(**batch, fused_lm_head=True, use_cache=False).log_probs.sum(1)
        ratios = policy(**batch, fused_lm_head=True, use_cache=False).log_probs.sum(1) - expected
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1]))
        loss.backward()
    if sharing is not None:
        for parameter in policy.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    seconds = time.perf_counter() - start
    norm = float(torch.stack([p.grad.double().norm() for p in policy.parameters()]).norm())
    return seconds, float(loss.detach()), norm


@contextlib.contextmanager
def _counted():
    """The bytes that leave this rank for the numbers of whole rows."""
    sent: list[int] = []
    own = gathered._GatherShares.apply

    def counting(local, group, stopwatch):
        others = dist.get_world_size(group) - 1  # an all-gather forward, a reduce-scatter backward
        sent.append((2 if local.requires_grad else 1) * others * local.numel() * local.element_size())
        return own(local, group, stopwatch)

    gathered._GatherShares.apply = counting
    try:
        yield sent
    finally:
        gathered._GatherShares.apply = own

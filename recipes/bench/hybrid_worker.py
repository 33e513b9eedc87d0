"""What every rank of the hybrid benchmark does: one layer on whole rows alone, then on its share with the others.

One process is measured on the first rank while the others wait, right before the shared run, so that other programs
disturb both alike. Started by `hybrid.py` through the ranks of `hf-longctx verify`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from ulysses_worker import Meter

from hf_longctx import SequenceMesh
from hf_longctx.adapters.instance_forward import patches_on
from hf_longctx.adapters.pass_shard import ForwardRows
from hf_longctx.adapters.recurrent.delta_exchange import DeltaSizes
from hf_longctx.adapters.recurrent.delta_rule import delta_rule
from hf_longctx.adapters.recurrent.layers import RECURRENT, RULES, follow_recurrences
from hf_longctx.parallel.shard import share_of_group


RULE = "torch_chunk_gated_delta_rule"
KERNEL = 4  # of the layer's convolution
WARM_UP_TOKENS = 256


def measure(settings: dict) -> dict:
    """Numbers of this rank for one way to share rows of one length."""
    torch.manual_seed(0)
    layer = _layer(settings)
    mesh = SequenceMesh.build(dist.get_world_size())
    RULES[RULE] = functools.partial(delta_rule, exchange=settings["exchange"])
    for tokens in (min(WARM_UP_TOKENS, settings["tokens"]), settings["tokens"]):
        hidden, upstream = (torch.randn(1, tokens, settings["hidden"]) for _ in range(2))
        dist.barrier()
        alone, expected = _run(layer, hidden, upstream) if dist.get_rank() == 0 else ({}, {})
        dist.barrier()
        batch = {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}
        shard = share_of_group(batch, mesh, inner_attention="auto", shift_labels=True)["sequence_shard"]
        mine = slice(shard.rank * shard.local_len, (shard.rank + 1) * shard.local_len)
        handle = follow_recurrences(layer)
        reader = next(patch for patch in patches_on(layer) if patch.name == RECURRENT)
        reader.rows = ForwardRows(shard, None, None, False)
        with _counted() as sent:
            together, found = _run(layer, hidden[:, mine], upstream[:, mine])
        handle.remove()
    found = _gathered(found)
    errors = [float((found[name] - value).norm() / value.norm()) for name, value in expected.items()]
    return {"alone": alone, "together": together, "error": max(errors, default=0.0), "bytes": sum(sent)}


def formula(settings: dict, exchange: str) -> int:
    """Bytes that leave a rank, forward and backward: of the delta rule and of the convolution's tails."""
    ranks, tokens = settings["ranks"], settings["tokens"] // settings["ranks"]
    heads, key_heads, size = settings["heads"], settings["key_heads"], settings["head_size"]
    rule = DeltaSizes(ranks, 1, tokens, key_heads, heads, size, size, 1, 4, 4, 4).bytes_of(exchange)
    return rule + 2 * (ranks - 1) * 4 * (KERNEL - 1) * size * (2 * key_heads + heads)


def _layer(settings: dict) -> torch.nn.Module:
    config = Qwen3NextConfig(
        hidden_size=settings["hidden"],
        linear_num_key_heads=settings["key_heads"],
        linear_num_value_heads=settings["heads"],
        linear_key_head_dim=settings["head_size"],
        linear_value_head_dim=settings["head_size"],
        linear_conv_kernel_dim=KERNEL,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    return Qwen3NextGatedDeltaNet(config, 0)


def _run(layer: torch.nn.Module, hidden: torch.Tensor, upstream: torch.Tensor) -> tuple[dict, dict]:
    """Clocks of one forward and backward, and the gradients."""
    layer.zero_grad(set_to_none=True)
    hidden = hidden.clone().requires_grad_()
    meter = Meter("cpu")
    meter.start()
    layer(hidden_states=hidden).backward(upstream)
    times = meter.stop()
    return times, {"hidden": hidden.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}


def _gathered(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of whole rows and of all ranks."""
    parts = [torch.empty_like(found["hidden"]) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, found["hidden"].contiguous())
    for name, gradient in found.items():
        if name != "hidden":
            dist.all_reduce(gradient)
    return {**found, "hidden": torch.cat(parts, dim=1)}


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """A block in which the bytes that leave this rank are listed, collective by collective."""
    plain = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather", "reduce_scatter")}
    sent: list[int] = []

    def trade(received, buffer, receive, send, group):
        sent.append(buffer.element_size() * (sum(send) - send[dist.get_rank(group)]))
        return plain["all_to_all_single"](received, buffer, receive, send, group=group)

    def gather(parts, local, group):
        sent.append(local.nbytes * (len(parts) - 1))
        return plain["all_gather"](parts, local, group=group)

    def scatter(mine, parts, group):
        sent.append(mine.nbytes * (len(parts) - 1))
        return plain["reduce_scatter"](mine, parts, group=group)

    try:
        dist.all_to_all_single, dist.all_gather, dist.reduce_scatter = trade, gather, scatter
        yield sent
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)

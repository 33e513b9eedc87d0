"""Delta rules on rows that ranks share: outputs and all gradients are one process's, by states and by heads."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from hf_longctx import SequenceMesh, gather_sequence, shard_batch
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.adapters.recurrent import layers
from hf_longctx.adapters.recurrent.delta_rule import delta_rule

from ..hybrids import HYBRIDS, build, gradients, one_process, rows_of, upstream, with_chunks, worst

ROWS = {
    "7": rows_of(7),
    "45": rows_of(45),
    "150": rows_of(150, rows=1),
    "left": rows_of(45, left=30),
    "packed": rows_of(1, 9, 1, 21, 13),
    "fill": rows_of(2, 3),
}


def shared(model, batch, mesh):
    share, weights = shard_batch(batch, mesh), upstream(batch)
    shard = share["sequence_shard"]
    whole = torch.nn.functional.pad(weights, (0, 0, 0, shard.local_len * shard.size - weights.shape[1]))
    mine = whole[:, shard.rank * shard.local_len :][:, : shard.local_len]
    logits = model(**share, use_cache=False).logits
    (logits * mine).sum().backward()
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient, group=mesh.sp_group)
    return gather_sequence(logits.detach() * (mine != 0), mesh.sp_group)[:, : shard.num_tokens], found


def on_the_world(name, exchange, size):
    mesh, model = SequenceMesh.build(size), build(name)
    for rule in ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"):
        layers.RULES[rule] = functools.partial(delta_rule, exchange=exchange)
    attach_adapters(model)
    return [shared(model, batch, mesh) for batch in ROWS.values()]


if __name__ == "__main__":
    import sys
    from hf_longctx.proof.ranks import Ranks
    from tests.harness import World
    for size in (2, 4):
        with World(size) as world:
            for name in sys.argv[1:] or HYBRIDS:
                refs = [one_process(build(name, "sdpa"), b) for b in ROWS.values()]
                noise = [worst(one_process(with_chunks(build(name, "sdpa"), 16), b), r) for b, r in zip(ROWS.values(), refs)]
                for exchange in ("heads", "states", None):
                    for rank, answers in enumerate(world.run(on_the_world, name, exchange, size)):
                        if rank: continue
                        for kind, a, r, n in zip(ROWS, answers, refs, noise):
                            w = worst(a, r)
                            top = max((k for k in w if k not in ("worst", "logits")), key=w.get)
                            ntop = max((k for k in n if k not in ("worst", "logits")), key=n.get)
                            print(f"P={size} {name:18} {str(exchange):7} {kind:7} logits {w['logits']:.1e} ({n['logits']:.1e}) grad {w['worst']:.1e} (noise {n['worst']:.1e}) {top[-32:]} ({ntop[-32:]})", flush=True)

"""LSH attention in reversible layers: packed rows that two ranks share, against one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hf_longctx import LSHConfig, SequenceMesh, adapt, make_reversible, shard_batch, tie_query_key, use_lsh

from ..models import config_of


LENGTHS = (9, 1, 17, 6)


def gradients(size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of a packed row, and every gradient, averaged over the ranks that share it."""
    torch.manual_seed(0)
    config = config_of("llama", num_key_value_heads=6)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ulysses" if size > 1 else "packed")
    tie_query_key(model)
    use_lsh(model, LSHConfig(num_hashes=2, window=4, num_buckets=4))
    make_reversible(model)
    mesh = SequenceMesh.build(size) if size > 1 else SequenceMesh.build()
    adapt(model, mesh)
    ids = torch.randint(1, 90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    batch = {"input_ids": ids, "labels": torch.where(positions == 0, -100, ids), "position_ids": positions}
    loss = model.train()(**shard_batch(batch, mesh, model), use_cache=False).loss
    loss.backward()
    total, found = loss.detach().clone(), {name: p.grad for name, p in model.named_parameters()}
    if size > 1:
        for value in (total, *found.values()):
            dist.all_reduce(value, group=mesh.sp_group)
            value /= size
    return total.item(), found


def test_two_ranks_equal_one_process(world2):
    """In float32, whose sums are ordered otherwise on shares: 1e-5 of the largest entry."""
    expected_loss, expected = gradients(1)
    for loss, found in world2.run(gradients, 2):
        assert abs(loss - expected_loss) < 1e-5
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name

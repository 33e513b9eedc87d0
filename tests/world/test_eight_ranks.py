"""28 query heads on 8 ranks (Qwen2.5-7B's geometry), and other splits that two or four ranks do not show.

Only torch is imported in the processes, so that eight of them start quickly.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_longctx.parallel.collectives import heads_to_sequence, sequence_to_heads
from hf_longctx.parallel.heads import split_heads
from hf_longctx.parallel.mesh import SequenceMesh


TOKENS = 16


def tensors(heads: int, key_value_heads: int):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 4), (key_value_heads, 4), (key_value_heads, 6)]
    made = [torch.randn(2, n, TOKENS, size, generator=generator, dtype=torch.float64) for n, size in shapes]
    return made, torch.randn(2, TOKENS, heads, 6, generator=generator, dtype=torch.float64)


def attend(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def on_one_rank(heads: int, key_value_heads: int):
    mesh = SequenceMesh.build(8)
    rank, local_len = mesh.sequence_parallel_rank, TOKENS // 8
    mine = slice(rank * local_len, (rank + 1) * local_len)
    full, upstream = tensors(heads, key_value_heads)
    leaves = [tensor[:, :, mine].clone().requires_grad_() for tensor in full]
    split = split_heads(heads, key_value_heads, 8)
    query, key, value = sequence_to_heads(*leaves, split, mesh.sp_group)
    index = split.key_value_index(rank)
    if index is None:
        repeats = query.shape[1] // key.shape[1]
        index = [head // repeats for head in range(query.shape[1])]
    output = heads_to_sequence(attend(query, key[:, list(index)], value[:, list(index)]), split, mesh.sp_group)
    (output * upstream[:, mine]).sum().backward()
    return output.detach(), *[leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("heads", "key_value_heads"), [(28, 4), (9, 3), (8, 1), (14, 2)])
def test_uneven_heads_on_eight_ranks_equal_one(worlds, heads, key_value_heads):
    full, upstream = tensors(heads, key_value_heads)
    leaves = [tensor.requires_grad_() for tensor in full]
    groups = heads // key_value_heads
    repeated = [leaf.repeat_interleave(groups, dim=1) for leaf in leaves[1:]]
    expected = attend(leaves[0], *repeated)
    (expected * upstream).sum().backward()
    results = worlds(8).run(on_one_rank, heads, key_value_heads)
    torch.testing.assert_close(torch.cat([result[0] for result in results], dim=1), expected.detach())
    for index, leaf in enumerate(leaves, start=1):
        torch.testing.assert_close(torch.cat([result[index] for result in results], dim=2), leaf.grad)

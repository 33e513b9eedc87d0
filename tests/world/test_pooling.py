"""Vectors of spans whose tokens live on several ranks: values and gradients are those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hf_longctx.parallel.pooling import Spans, pool_spans

from ..pooling import LAYOUTS, gradient, modes_of, pool_by_loop, random_hidden, random_upstream, spans_of


def compare_every_layout(local_len: int) -> float:
    """The largest difference to one process. Each rank's upstream gradient is another one: their sum flows back."""
    rank, size, worst = dist.get_rank(), dist.get_world_size(), 0.0
    first = rank * local_len
    for layout in LAYOUTS:
        whole, spans, modes = random_hidden(5, torch.float64).requires_grad_(), spans_of(layout), modes_of(layout)
        mine = whole.detach()[first : first + local_len].requires_grad_()
        actual = pool_spans(mine, spans, modes, first_token=first, group=dist.group.WORLD)
        expected = [pool_by_loop(whole, spans, mode) for mode in modes]
        upstreams = [random_upstream(expected, seed) for seed in range(size)]
        actual.append(gradient(actual, upstreams[rank], mine))
        everyones = [torch.stack(gradients).sum(0) for gradients in zip(*upstreams)]
        expected.append(gradient(expected, everyones, whole)[first : first + local_len])
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.shape == theirs.shape and torch.equal(ours.isfinite(), theirs.isfinite())
            worst = max(worst, float((ours - theirs).nan_to_num().abs().max()) if ours.numel() else 0.0)
    return worst


@pytest.mark.parametrize(("size", "local_len"), [(2, 6), (2, 10), (4, 3), (4, 4)])
def test_every_mode_equals_one_process(worlds, size, local_len):
    """Shares of 6 and 5 tokens, 10 and 1, 3, 3, 3 and 2, and 4, 4, 3 and none."""
    assert max(worlds(size).run(compare_every_layout, local_len)) < 1e-14


def pool_equal_tokens() -> list[float]:
    """Six tokens on two ranks in two spans; the maximum of the first is met twice here and once there."""
    rank = dist.get_rank()
    mine = torch.tensor([[[2.0], [2.0], [1.0]], [[2.0], [0.0], [3.0]]][rank], requires_grad=True)
    spans = Spans(*(torch.tensor(numbers) for numbers in ([0, 4], [4, 6], [0, 4])))
    vectors = pool_spans(mine, spans, ("max",), first_token=3 * rank, group=dist.group.WORLD)
    assert vectors[0].tolist() == [[2.0], [3.0]]
    return gradient(vectors, [torch.tensor([[6.0 + 3 * rank], [1.0 + rank]])], mine).flatten().tolist()


def test_equal_maxima_on_several_ranks_share_the_gradient_evenly(world2):
    """The ranks' gradients 6 and 9 make 15, for three tokens; 1 and 2 make 3, for one."""
    assert world2.run(pool_equal_tokens) == [[5, 5, 0], [5, 0, 3]]

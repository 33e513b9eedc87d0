"""Batches by tokens: every row once over all replicas, no batch over the budget, equal work in a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_longctx.data.packing.collator import PackingCollator
from hf_longctx.data.packing.datasets import PackedDataset
from hf_longctx.data.packing.lengths import pack_lengths, packing_cost
from hf_longctx.data.packing.samplers import BalancedSampler, TokenBudgetSampler


LENGTHS = np.random.default_rng(0).lognormal(3, 1, 500).astype(int).clip(1, 256)


def replicas(count: int, **options) -> list[TokenBudgetSampler]:
    return [TokenBudgetSampler(LENGTHS, 256, num_replicas=count, rank=rank, **options) for rank in range(count)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_every_row_is_drawn_once_and_no_batch_is_over_the_budget(count, shuffle):
    drawn = [list(sampler) for sampler in replicas(count, shuffle=shuffle)]
    assert {len(batches) for batches in drawn} == {len(sampler) for sampler in replicas(count)}
    assert max(LENGTHS[batch].sum() for batches in drawn for batch in batches) <= 256
    in_order = [batch for step in zip(*drawn) for batch in step]
    num_bins = len(replicas(1)[0])
    assert sorted(row for batch in in_order[:num_bins] for row in batch) == list(range(len(LENGTHS)))
    repeated = len(in_order) - num_bins
    assert repeated == -num_bins % count and in_order[num_bins:] == in_order[:repeated]


def test_drop_last_leaves_out_what_fills_no_step():
    num_bins = len(replicas(1)[0])
    count = next(count for count in range(3, 10) if num_bins % count)
    drawn = [list(sampler) for sampler in replicas(count, drop_last=True)]
    assert {len(batches) for batches in drawn} == {num_bins // count} == {len(replicas(count, drop_last=True)[0])}
    rows = [row for batches in drawn for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) < len(LENGTHS)


def test_more_replicas_than_batches_draw_some_again():
    drawn = [list(TokenBudgetSampler([3, 4], 4, num_replicas=5, rank=rank)) for rank in range(5)]
    assert [len(batches) for batches in drawn] == [1] * 5
    assert sorted(row for batches in drawn for row in batches[0]) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_epochs_and_seeds_draw_other_orders_and_the_same_ones_again():
    sampler = TokenBudgetSampler(LENGTHS, 256)
    first = list(sampler)
    assert list(sampler) == first == list(TokenBudgetSampler(LENGTHS, 256))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and sorted(second) == sorted(first)
    assert list(TokenBudgetSampler(LENGTHS, 256, seed=1)) != first
    still = TokenBudgetSampler(LENGTHS, 256, shuffle=False)
    before = list(still)
    still.set_epoch(1)
    assert list(still) == before


def test_in_order_without_shuffling_reads_the_rows_as_they_come():
    batches = list(TokenBudgetSampler([3, 4, 2, 6], 7, strategy="in_order", shuffle=False))
    assert batches == [[0, 1], [2], [3]]


def imbalance(batches: list[tuple[list[int], ...]], lengths: np.ndarray, linear_tokens: float) -> float:
    costs = np.array([[packing_cost(lengths[batch], linear_tokens) for batch in step] for step in batches])
    return float((costs.max(axis=1) / costs.mean(axis=1)).mean())


def test_four_replicas_have_equal_work_in_every_step():
    lengths = np.random.default_rng(1).lognormal(np.log(400), 1.0, 8000).astype(int).clip(1, 8192)
    options = {"num_replicas": 4, "linear_tokens": 12 * 128}
    balanced = zip(*(TokenBudgetSampler(lengths, 8192, rank=rank, **options) for rank in range(4)))
    batches = list(TokenBudgetSampler(lengths, 8192, shuffle=False))
    shuffled = np.random.default_rng(0).permutation(len(batches))[: len(batches) // 4 * 4].reshape(-1, 4)
    assert imbalance([[batches[i] for i in step] for step in shuffled.tolist()], lengths, 12 * 128) > 1.4
    # measured: 1.04, and 1.52 above; one step may hold what fills no group
    assert imbalance(list(balanced), lengths, 12 * 128) < 1.1


def test_a_loader_with_the_collator_gives_every_token():
    rows = [{"input_ids": [token] * length} for token, length in enumerate(LENGTHS.tolist(), start=1)]
    sampler = TokenBudgetSampler(LENGTHS, max_tokens=256)
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=PackingCollator(max_tokens=256))
    batches = list(loader)
    assert len(batches) == len(loader) == len(sampler)
    assert torch.equal(torch.cat([b["input_ids"][0] for b in batches]).bincount()[1:], torch.from_numpy(LENGTHS))


def test_balanced_sampler_orders_packed_rows():
    costs = pack_lengths(LENGTHS, 256, seed=0).costs(100)
    sampler = BalancedSampler(costs, 4, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(len(costs))) and len(sampler) == len(costs)
    assert order == list(BalancedSampler(costs.tolist(), 4, seed=3)) != list(BalancedSampler(costs, 4, seed=4))
    steps = costs[order[: len(costs) // 4 * 4]].reshape(-1, 4)
    assert (steps.max(axis=1) / steps.mean(axis=1)).mean() < 1.1
    sampler.set_epoch(1)
    assert list(sampler) != order
    packed = PackedDataset([{"input_ids": [1] * length} for length in LENGTHS], 256)
    loader = DataLoader(packed, sampler=BalancedSampler(packed.packing.costs(100), 4), collate_fn=PackingCollator())
    assert sum(batch["input_ids"].numel() for batch in loader) == LENGTHS.sum()


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3], {"rank": 1}, r"`rank` \(1\) must be at least 0 and below `num_replicas` \(1\)"),
        ([3], {"num_replicas": 0}, r"below `num_replicas` \(0\)"),
        ([3, 9], {}, r"row 1 has 9 tokens, over `max_tokens` \(8\), one of 1 such rows, and a sampler cannot cut"),
        ([3, 0], {}, "row 1 has 0 tokens"),
        ([], {}, "`lengths` is empty"),
        ([3], {"max_tokens": 0}, "`max_tokens`"),
        ([3], {"strategy": "x"}, "`strategy`"),
        (
            [3],
            {"drop_last": True, "num_replicas": 2},
            "`drop_last` leaves no batch: 1 batches do not fill a step of 2",
        ),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler(lengths, **{"max_tokens": 8, **options})


def test_groups_out_of_range_are_refused_before_the_first_epoch():
    with pytest.raises(ValueError, match=r"`group_size` \(0\)"):
        BalancedSampler([1.0], 0)
    with pytest.raises(ValueError, match=r"`window` \(0\)"):
        BalancedSampler([1.0], 2, window=0)

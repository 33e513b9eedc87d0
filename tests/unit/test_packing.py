"""Lengths become bins that hold every token once, and data sets become rows of documents."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_longctx.data.packing.datasets import (
    PackedDataset,
    PackedRow,
    PackedStream,
    cut_document,
    measure_lengths,
)
from hf_longctx.data.packing.lengths import (
    STRATEGIES,
    Packing,
    Piece,
    balanced_order,
    cut_documents,
    pack_lengths,
    packing_cost,
)
from hf_longctx.data.streams import is_stream


def lognormal(count: int, seed: int = 0, budget: int = 8192) -> np.ndarray:
    lengths = np.random.default_rng(seed).lognormal(np.log(400), 1.0, count).astype(int)
    return lengths.clip(1, budget)


def random_mix(seed: int) -> tuple[np.ndarray, int]:
    """Few or many documents, of like or very different lengths, some over the budget."""
    rng = np.random.default_rng(seed)
    budget = int(rng.choice([1, 2, 7, 64, 100, 1000]))
    spread = int(rng.choice([1, 3, budget, 4 * budget]))
    return rng.integers(1, spread + 1, int(rng.choice([1, 2, 9, 200]))), budget


def pieces_of(packing: Packing) -> list[list[Piece]]:
    return [packing[i] for i in range(len(packing))]


# Every token once


@pytest.mark.parametrize("long_documents", ["split", "truncate"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(25))
def test_every_token_lands_once_and_no_bin_is_over_the_budget(seed, strategy, long_documents):
    lengths, budget = random_mix(seed)
    packing = pack_lengths(lengths, budget, strategy=strategy, long_documents=long_documents, seed=seed)
    seen = [(row, token) for pieces in packing for row, start, stop in pieces for token in range(start, stop)]
    kept = lengths if long_documents == "split" else lengths.clip(max=budget)
    assert sorted(seen) == [(row, token) for row, length in enumerate(kept) for token in range(length)]
    tokens = [sum(piece.stop - piece.start for piece in pieces) for pieces in packing]
    assert min(tokens) > 0 and max(tokens) <= budget
    assert packing.bin_tokens.tolist() == tokens
    assert packing.efficiency == pytest.approx(sum(tokens) / (len(tokens) * budget))


def naive_bins(sizes: list[int], budget: int, strategy: str) -> list[list[int]]:
    """The slow reference: one piece after another, looking at every bin."""
    bins: list[list[int]] = []
    for size in sizes if strategy == "in_order" else sorted(sizes, reverse=True):
        rooms = [budget - sum(inside) for inside in bins]
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if strategy == "in_order":
            fitting = [i for i in fitting if i == len(bins) - 1]
        if strategy == "best_fit_decreasing":
            fitting.sort(key=lambda i: rooms[i])
        if not fitting:
            bins.append([])
        bins[fitting[0] if fitting else -1].append(size)
    return bins


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(40))
def test_bins_are_those_of_the_slow_twin(seed, strategy):
    lengths, budget = random_mix(seed)
    packing = pack_lengths(lengths, budget, strategy=strategy, long_documents="split", seed=seed)
    _rows, starts, stops = cut_documents(lengths, budget, "split")
    expected = naive_bins((stops - starts).tolist(), budget, strategy)
    found = [[piece.stop - piece.start for piece in pieces] for pieces in packing]
    if strategy == "best_fit_decreasing":  # bins with equal room are alike, so only what they hold in all is decided
        found, expected = ([[sum(inside)] for inside in bins] for bins in (found, expected))
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_in_order_keeps_the_order_of_documents_and_tokens():
    packing = pack_lengths([3, 9, 2, 4, 5], 6, strategy="in_order", long_documents="split", seed=3)
    assert pieces_of(packing) == [
        [(0, 0, 3)],
        [(1, 0, 6)],
        [(1, 6, 9), (2, 0, 2)],
        [(3, 0, 4)],
        [(4, 0, 5)],
    ]
    assert packing.lengths.tolist() == [3, 6, 3, 2, 4, 5]


def test_bins_are_counted_from_both_ends_and_not_beyond():
    packing = pack_lengths([4, 4, 4], 4)
    assert packing[-1] == packing[2] and len(list(packing)) == 3
    for index in (3, -4):
        with pytest.raises(IndexError):
            packing[index]


def test_split_makes_consecutive_pieces_and_truncate_keeps_the_first():
    rows, starts, stops = cut_documents([10, 4, 8], 4, "split")
    assert list(zip(rows, starts, stops)) == [(0, 0, 4), (0, 4, 8), (0, 8, 10), (1, 0, 4), (2, 0, 4), (2, 4, 8)]
    rows, starts, stops = cut_documents([10, 4, 8], 4, "truncate")
    assert list(zip(rows, starts, stops)) == [(0, 0, 4), (1, 0, 4), (2, 0, 4)]


# How well, and how fast


def test_best_fit_fills_99_percent_of_a_lognormal_mix():
    lengths = lognormal(10_000)
    assert pack_lengths(lengths, 8192).efficiency >= 0.99
    assert pack_lengths(lengths, 8192, strategy="first_fit_decreasing").efficiency >= 0.99


@pytest.mark.parametrize("seed", range(4))
def test_never_more_bins_than_trl(seed):
    data_utils = pytest.importorskip("trl.data_utils")
    budget = int(np.random.default_rng(seed).choice([128, 1000, 4096]))
    lengths = lognormal(1500, seed, budget)
    dataset = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    ours = len(pack_lengths(lengths, budget))
    at_once = data_utils.pack_dataset(dataset, budget, "bfd", map_kwargs={"batch_size": len(dataset)})
    assert ours == len(at_once)  # the same method
    assert ours <= len(data_utils.pack_dataset(dataset, budget, "bfd"))  # which packs 1,000 documents at a time


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spread", ["lognormal", "all distinct"])
def test_a_million_documents_take_seconds(strategy, spread):
    budget = 8192 if spread == "lognormal" else 1_000_000
    if spread == "lognormal":
        lengths = lognormal(1_000_000)
    else:
        lengths = np.random.default_rng(0).permutation(1_000_000) + 1
    start = time.process_time()  # of this process alone: other work on the machine does not count
    packing = pack_lengths(lengths, budget, strategy=strategy, seed=0)
    assert time.process_time() - start < 10  # measured: 0.1 to 2 seconds
    assert packing.bin_tokens.max() <= budget and packing.lengths.sum() == lengths.sum()


def test_packing_needs_no_torch():
    code = "import json, sys, hf_longctx.data.packing.lengths; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) is False, done.stderr


# Determinism


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_seed_decides_between_equal_lengths_only(strategy):
    lengths = np.random.default_rng(0).integers(1, 20, 300)
    packings = [pack_lengths(lengths, 64, strategy=strategy, seed=seed) for seed in (1, 1, 2, None)]
    same, again, other, unseeded = map(pieces_of, packings)
    assert same == again
    assert (same == other) == (strategy == "in_order")
    assert (same == unseeded) == (strategy == "in_order")
    assert all(np.array_equal(packings[0].lengths, packing.lengths) for packing in packings)


# What rows cost


def test_cost_is_the_sum_over_documents():
    assert packing_cost([3, 5], 10) == 9 + 30 + 25 + 50
    packing = pack_lengths([3, 5, 7], 8, strategy="in_order")
    assert packing.costs(10).tolist() == [9 + 30 + 25 + 50, 49 + 70]
    assert packing_cost([1_000_000] * 10, 0) == 1e13  # beyond 32 bits


def test_attention_costs_as_much_as_everything_else_at_linear_tokens():
    width, layers = 64, 1
    length = 12 * width
    matrices = 2 * length * (4 * width**2 + 8 * width**2) * layers
    attention = sum(4 * width * (query + 0.5) for query in range(length)) * layers
    assert attention == pytest.approx(matrices)
    assert packing_cost([length], 12 * width) * 2 * width == pytest.approx(matrices + attention)


def step_imbalance(costs: np.ndarray, order: np.ndarray, ranks: int) -> float:
    """Mean over steps of the slowest rank's cost over the mean rank's."""
    steps = costs[order[: len(order) // ranks * ranks]].reshape(-1, ranks)
    return float((steps.max(axis=1) / steps.mean(axis=1)).mean())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_of_a_step_have_equal_work(strategy):
    costs = pack_lengths(lognormal(20_000), 8192, strategy=strategy, seed=0).costs(12 * 128)
    shuffled = step_imbalance(costs, np.random.default_rng(1).permutation(len(costs)), 4)
    balanced = step_imbalance(costs, balanced_order(costs, 4, seed=0), 4)
    assert shuffled > 1.35  # measured: 1.41 to 1.53
    assert balanced < 1.05  # measured: 1.02 to 1.04


@pytest.mark.parametrize(("count", "group"), [(1, 1), (7, 1), (3, 4), (4, 4), (41, 4), (132, 4), (1000, 8)])
def test_balanced_order_is_a_permutation_of_its_seed_and_epoch(count, group):
    costs = np.random.default_rng(0).random(count)
    orders = [balanced_order(costs, group, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert np.array_equal(orders[0], orders[1])
    if count > 7:
        assert not np.array_equal(orders[0], orders[2]) and not np.array_equal(orders[0], orders[3])


def test_a_window_leaves_no_small_rest_and_every_rank_gets_every_share():
    costs = np.random.default_rng(0).random(4 * 33)  # one group more than a window
    orders = [balanced_order(costs, 4, seed=0, epoch=epoch) for epoch in range(60)]
    assert max(np.ptp(costs[order].reshape(-1, 4), axis=1).max() for order in orders) < 0.25  # 0.9 for any four
    first, last = (np.mean([costs[order[rank::4]].sum() for order in orders]) for rank in (0, 3))
    assert first == pytest.approx(last, rel=0.01)  # the cheapest of a group is not always rank 0's


def test_what_fills_no_group_comes_last_whatever_it_costs():
    costs = np.arange(43.0)
    rests = [balanced_order(costs, 4, seed=0, epoch=epoch)[40:] for epoch in range(60)]
    assert len(set(np.concatenate(rests))) > 30


# Data sets


def documents(lengths, seed: int = 0) -> list[dict]:
    """Rows whose tokens are all different, so that each can be found again."""
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    ids = [list(range(first, last)) for first, last in zip(bounds, bounds[1:])]
    return [{"input_ids": tokens, "labels": [-token for token in tokens], "name": f"d{tokens[0]}"} for tokens in ids]


def tokens_of(row: PackedRow) -> list[int]:
    assert isinstance(row, PackedRow)
    assert all(document["labels"] == [-token for token in document["input_ids"]] for document in row)
    return [token for document in row for token in document["input_ids"]]


class Plain(torch.utils.data.Dataset):
    """A map-style data set with nothing but the two methods."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("kind", [list, Plain, Dataset.from_list])
@pytest.mark.parametrize("long_documents", ["split", "truncate"])
def test_packed_dataset_gives_every_token_once(kind, long_documents):
    lengths = np.random.default_rng(0).integers(1, 40, 50)
    packed = PackedDataset(kind(documents(lengths)), 24, long_documents=long_documents)
    rows = [packed[i] for i in range(len(packed))]
    kept = [doc["input_ids"][: 24 if long_documents == "truncate" else None] for doc in documents(lengths)]
    assert sorted(token for row in rows for token in tokens_of(row)) == sum(kept, [])
    assert max(len(tokens_of(row)) for row in rows) <= 24
    assert packed.__getitems__([0, 2, len(packed) - 1]) == [rows[0], rows[2], rows[-1]]
    assert pickle.loads(pickle.dumps(packed))[1] == rows[1]


def test_packed_dataset_reads_the_documents_of_a_batch_at_once():
    calls = []

    class Counting(Plain):
        def __getitems__(self, indices):
            calls.append(indices)
            return [self.rows[index] for index in indices]

    packed = PackedDataset(Counting(documents([2, 3, 4])), 5, strategy="in_order")
    assert packed.__getitems__([1, 0]) == [[packed.dataset.rows[2]], packed.dataset.rows[:2]]
    assert calls == [[2, 0, 1]]


def test_packed_dataset_can_be_read_by_a_loader_with_workers():
    packed = PackedDataset(documents([5, 3, 2, 4]), 8, strategy="in_order")
    loader = torch.utils.data.DataLoader(packed, batch_size=2, num_workers=1, collate_fn=list)
    assert [type(row) for batch in loader for row in batch] == [PackedRow, PackedRow]


def test_tensors_and_arrays_are_cut_like_lists():
    row = {"input_ids": torch.arange(5), "weights": np.arange(5.0), "labels": list(range(5)), "id": 7, "text": "abcde"}
    part = cut_document(row, 1, 3)
    assert part["input_ids"].tolist() == part["weights"].tolist() == part["labels"] == [1, 2]
    assert part["id"] == 7 and part["text"] == "abcde"
    assert cut_document(row, 0, 5) is row


def test_the_documents_inside_a_row_that_trl_packed_are_cut_with_it():
    row = {"input_ids": list(range(9)), "seq_lengths": [3, 4, 2]}
    assert cut_document(row, 0, 5)["seq_lengths"] == [3, 2]
    assert cut_document(row, 5, 9)["seq_lengths"] == [2, 2]
    assert cut_document(row, 3, 7) == {"input_ids": [3, 4, 5, 6], "seq_lengths": [4]}
    singles = {"input_ids": [1, 2, 3], "seq_lengths": [1, 1, 1]}  # as long as the row
    assert cut_document(singles, 1, 3) == {"input_ids": [2, 3], "seq_lengths": [1, 1]}
    packed = PackedDataset(Dataset.from_list([row]), 5, strategy="in_order", long_documents="split")
    assert [document["seq_lengths"] for row in packed for document in row] == [[3, 2], [2, 2]]


# Lengths


LENGTHS = [4, 1, 3, 2]


@pytest.mark.parametrize("rows", [documents(LENGTHS), [{"input_ids": [1], "length": n} for n in LENGTHS]])
@pytest.mark.parametrize("kind", [list, Plain, Dataset.from_list])
def test_lengths_come_from_a_column_or_from_the_tokens(kind, rows):
    assert measure_lengths(kind(rows)).tolist() == LENGTHS
    assert measure_lengths(kind(rows), "no_such_column").tolist() == [len(row["input_ids"]) for row in rows]


def test_lengths_honour_selected_and_shuffled_rows_and_any_format():
    dataset = Dataset.from_list(documents(LENGTHS))
    assert measure_lengths(dataset.select([2, 0])).tolist() == [3, 4]
    shuffled = dataset.shuffle(seed=1)
    assert measure_lengths(shuffled).tolist() == [len(row["input_ids"]) for row in shuffled]
    assert measure_lengths(dataset.with_format("torch", columns=["labels"])).tolist() == LENGTHS
    assert measure_lengths(dataset.select([])).tolist() == []


def test_lengths_of_tokens_made_on_the_fly():
    dataset = Dataset.from_dict({"text": ["ab", "c"]})
    dataset = dataset.with_transform(lambda batch: {"input_ids": [list(map(ord, text)) for text in batch["text"]]})
    assert measure_lengths(dataset).tolist() == [2, 1]


def test_a_length_column_that_is_no_number_is_not_believed():
    assert measure_lengths(Dataset.from_dict({"input_ids": [[1, 2]], "length": ["long"]})).tolist() == [2]
    assert measure_lengths([{"input_ids": [1, 2], "length": 9.5}]).tolist() == [2]


def test_lengths_of_a_large_data_set_are_read_without_its_tokens():
    dataset = Dataset.from_dict({"input_ids": [list(range(500))] * 20_000})
    start = time.process_time()
    assert measure_lengths(dataset).sum() == 10_000_000
    assert time.process_time() - start < 1  # measured: 0.01 seconds; 5 row by row


# Streams


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows, self.epoch = rows, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("buffer_size", [1, 2, 7, 50, 51, 1000])
def test_a_stream_gives_every_token_once_whatever_its_buffer(buffer_size, strategy):
    rows = documents(np.random.default_rng(0).integers(1, 60, 51))
    stream = PackedStream(Stream(rows), 24, strategy=strategy, long_documents="split", buffer_size=buffer_size)
    packed = list(stream)
    assert sorted(token for row in packed for token in tokens_of(row)) == list(range(rows[-1]["input_ids"][-1] + 1))
    assert all(len(tokens_of(row)) <= 24 for row in packed)
    for document in (document for row in packed for document in row):
        assert document["input_ids"] == list(range(document["input_ids"][0], document["input_ids"][-1] + 1))
    assert packed == list(stream)
    if strategy == "in_order":
        whole = PackedDataset(rows, 24, strategy=strategy, long_documents="split")
        assert packed == [whole[i] for i in range(len(whole))]


def test_a_stream_holds_back_the_least_full_row():
    rows = documents([6, 5, 5, 4])
    packed = list(PackedStream(Stream(rows), 10, buffer_size=3))
    assert [sorted(len(document["input_ids"]) for document in row) for row in packed] == [[5, 5], [4, 6]]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("buffer_size", [1, 7, 50, 1000])
def test_rows_of_a_stream_come_in_full_steps_and_lose_nothing(buffer_size, strategy):
    lengths = np.random.default_rng(2).integers(1, 60, 300)
    stream = PackedStream(documents(lengths), 64, buffer_size=buffer_size, strategy=strategy, group_size=4)
    packed = list(stream)
    assert sorted(token for row in packed for token in tokens_of(row)) == sorted(
        token for document in documents(lengths) for token in document["input_ids"]
    )
    assert all(len(tokens_of(row)) <= 64 for row in packed) and packed == list(stream)
    if strategy == "in_order":
        assert packed == list(PackedStream(documents(lengths), 64, strategy=strategy))
    elif buffer_size == 1000:
        stream.set_epoch(1)
        assert sorted(map(tokens_of, stream)) == sorted(map(tokens_of, packed)) and list(stream) != packed


def test_rows_of_one_step_of_a_stream_have_equal_work():
    """Over several buffers: each begins with a new step."""
    lengths = np.random.default_rng(1).lognormal(np.log(400), 1.0, 8000).astype(int).clip(1, 8192)
    spread = {}
    for group_size in (1, 4):
        stream = PackedStream(
            documents(lengths), 8192, buffer_size=2000, group_size=group_size, linear_tokens=12 * 128
        )
        costs = [packing_cost([len(document["input_ids"]) for document in row], 12 * 128) for row in stream]
        costs = np.random.default_rng(0).permutation(costs) if group_size == 1 else np.array(costs)
        steps = costs[: len(costs) // 4 * 4].reshape(-1, 4)
        spread[group_size] = (steps.max(axis=1) / steps.mean(axis=1)).mean()
    assert spread[1] > 1.4 and spread[4] < 1.1, spread  # measured: 1.54 and 1.03


def test_large_buffers_pack_a_stream_better():
    rows = documents(np.random.default_rng(0).integers(1, 60, 500))
    counts = [len(list(PackedStream(rows, 64, buffer_size=size))) for size in (4, 500)]
    assert counts[1] == len(PackedDataset(rows, 64)) < 0.9 * counts[0]


def test_a_stream_of_the_hub_is_packed_and_told_its_epoch():
    stream = Dataset.from_list(documents([3, 4, 5])).to_iterable_dataset()
    assert isinstance(stream, IterableDataset) and is_stream(stream) and not is_stream(Dataset.from_list([]))
    assert [len(tokens_of(row)) for row in PackedStream(stream, 8, strategy="in_order")] == [7, 5]
    plain = Stream([])
    PackedStream(plain, 8).set_epoch(3)
    PackedStream([], 8).set_epoch(3)
    assert plain.epoch == 3


def test_a_row_of_a_stream_is_counted_from_its_start():
    rows = documents([3, 3, 3, 9])
    with pytest.raises(ValueError, match=r"row 3 has 9 tokens, over `max_tokens` \(8\)"):
        list(PackedStream(rows, 8, buffer_size=2))
    assert len(list(PackedStream(rows, 8, buffer_size=2, long_documents="truncate"))) == 3


# Refusals


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 8), {}, "`lengths` is empty"),
        (([3, 0, 2], 8), {}, "row 1 has 0 tokens, but every document needs at least one: filter"),
        (([3, 0, 2, 0], 8), {}, r"row 1 \(like 1 more\) has 0 tokens"),
        (([3, -1], 8), {"long_documents": "split"}, "row 1 has -1 tokens"),
        (([3, 9, 2, 12, 10], 8), {}, r"row 1 \(like 2 more\) has 9 tokens, over `max_tokens` \(8\): set `long_docum"),
        (([3], 0), {}, r"`max_tokens` \(0\) must be a whole number of at least 1"),
        (([3], 2.5), {}, r"`max_tokens` \(2.5\)"),
        (([3], True), {}, r"`max_tokens` \(True\)"),
        (([3], None), {}, r"`max_tokens` \(None\)"),
        (([3.0], 8), {}, "`lengths` has shape .* type float64, but it must be a flat list of whole numbers"),
        (([[3]], 8), {}, r"`lengths` has shape \(1, 1\)"),
        (([3], 8), {"strategy": "bfd"}, "`strategy` .'bfd'. must be one of 'in_order', 'first_fit_decreasing', "),
        (([3], 8), {"long_documents": "drop"}, "`long_documents` .'drop'. must be one of 'error', 'split', 'trunc"),
    ],
)
def test_lengths_that_cannot_be_packed_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        pack_lengths(*arguments, **options)


@pytest.mark.parametrize("name", ["group_size", "window"])
def test_an_order_needs_groups(name):
    with pytest.raises(ValueError, match=rf"`{name}` \(0\) must be at least 1"):
        balanced_order([1.0], **{"group_size": 2, "seed": 0, name: 0})


@pytest.mark.parametrize("kind", [list, Plain, Dataset.from_list])
def test_text_is_to_be_tokenized_first(kind):
    with pytest.raises(ValueError, match=r"no `input_ids` among the columns \(text, path\).*tokenize"):
        PackedDataset(kind([{"text": "a", "path": "b"}]), 8)
    with pytest.raises(ValueError, match=r"no `input_ids` among the columns \(length\)"):
        PackedDataset(kind([{"length": 3}]), 8)


def test_rows_must_be_mappings():
    with pytest.raises(ValueError, match="a row is a `tuple`, but a document must be a mapping with `input_ids`"):
        PackedDataset([([1, 2],)], 8)


def test_lengths_that_belong_to_another_data_set_are_refused():
    with pytest.raises(ValueError, match="`lengths` has 1 entries, but the data set has 2 rows"):
        PackedDataset(documents([3, 3]), 8, lengths=[3])
    packed = PackedDataset(documents([3, 4]), 8, lengths=[3, 3])
    with pytest.raises(ValueError, match="row 1 has 4 `input_ids`, but was packed as 3 tokens"):
        packed[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_size": 0}, r"`buffer_size` \(0\) must be at least 1"),
        ({"max_tokens": 0}, "`max_tokens`"),
        ({"strategy": "x"}, "`strategy`"),
        ({"long_documents": "x"}, "`long_documents`"),
    ],
)
def test_a_stream_refuses_its_settings_before_it_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        PackedStream([], **{"max_tokens": 8, **options})

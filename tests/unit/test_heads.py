"""Who owns which head, for every geometry: the definition is head `h` reads key/value head `h // (N / K)`."""

from __future__ import annotations

import pytest

from hf_longctx.parallel.heads import split_heads, validate_head_count


GEOMETRIES = [
    (heads, key_value_heads, size)
    for heads in (1, 2, 5, 6, 7, 8, 9, 12, 28, 64)
    for key_value_heads in range(1, heads + 1)
    if heads % key_value_heads == 0
    for size in range(1, min(heads, 9) + 1)
]


def all_geometries(check) -> None:
    for heads, key_value_heads, size in GEOMETRIES:
        check(split_heads(heads, key_value_heads, size), heads, key_value_heads, size)


def test_query_ranges_are_contiguous_and_cover_every_head_once():
    def check(split, heads, key_value_heads, size):
        assert len(split.query) == len(split.key_value) == size
        assert [head for start, stop in split.query for head in range(start, stop)] == list(range(heads))

    all_geometries(check)


def test_query_ranges_differ_by_at_most_one_head_and_none_is_empty():
    def check(split, heads, key_value_heads, size):
        counts = [split.query_count(rank) for rank in range(size)]
        assert counts == [stop - start for start, stop in split.query]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1

    all_geometries(check)


def test_rank_has_exactly_the_key_value_heads_its_queries_read():
    def check(split, heads, key_value_heads, size):
        group_size = heads // key_value_heads
        for rank in range(size):
            read = sorted({head // group_size for head in range(*split.query[rank])})
            assert list(range(*split.key_value[rank])) == read
            assert split.key_value_count(rank) == len(read)

    all_geometries(check)


def test_key_value_index_points_at_the_head_each_query_reads():
    plain = indexed = 0
    for heads, key_value_heads, size in GEOMETRIES:
        split, group_size = split_heads(heads, key_value_heads, size), heads // key_value_heads
        for rank in range(size):
            index = split.key_value_index(rank)
            count, have = split.query_count(rank), split.key_value_count(rank)
            if index is None:
                assert count % have == 0
                local = [i // (count // have) for i in range(count)]  # how a kernel groups heads by itself
                plain += 1
            else:
                local = list(index)
                indexed += 1
            first = split.key_value[rank][0]
            assert [first + i for i in local] == [head // group_size for head in range(*split.query[rank])]
    assert plain and indexed


def test_key_value_index_is_spared_where_plain_grouping_is_right():
    assert split_heads(8, 8, 4).key_value_index(2) is None
    assert split_heads(8, 2, 2).key_value_index(1) is None
    assert split_heads(9, 3, 2).key_value_index(0) == (0, 0, 0, 1, 1)
    # 4 query heads and 2 key/value heads divide, but the queries read them 3 and 1.
    assert split_heads(12, 4, 3).key_value_index(0) == (0, 0, 0, 1)


def test_replication_counts_key_value_heads_that_travel_twice():
    assert split_heads(8, 8, 4).replication() == 1.0
    assert split_heads(8, 2, 4).replication() == 2.0
    assert split_heads(6, 1, 6).replication() == 6.0
    assert split_heads(9, 3, 2).replication() == pytest.approx(4 / 3)


def test_one_rank_owns_everything():
    split = split_heads(9, 3, 1)
    assert split.query == ((0, 9),) and split.key_value == ((0, 3),) and split.key_value_index(0) is None


def test_more_ranks_than_query_heads_is_refused_with_the_sizes_that_work():
    for call in (lambda: split_heads(6, 2, 8), lambda: validate_head_count(6, 8)):
        with pytest.raises(ValueError) as error:
            call()
        assert "`sequence_parallel_size` (8)" in str(error.value) and "query heads (6)" in str(error.value)
        assert "any size from 1 to 6" in str(error.value)
    validate_head_count(6, 6)


def test_query_heads_that_are_no_multiple_of_key_value_heads_are_refused():
    with pytest.raises(ValueError) as error:
        split_heads(9, 2, 2)
    assert "query heads (9)" in str(error.value) and "key/value heads (2)" in str(error.value)
    assert "set `sequence_parallel_size` to 1" in str(error.value)

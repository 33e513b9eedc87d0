"""Blends: every source has its proportion at every prefix, however many stretches of rows run side by side."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_longctx.data.blend import chairman, stretches
from hf_longctx.data.blend.chairman import assign_sources
from hf_longctx.data.blend.proportions import Proportions


SKEWED = {
    "one": [3.0],
    "two": [0.3, 0.7],
    "fifty by a power": (1 / np.arange(1, 51) ** 2.0).tolist(),
    "fifty by factors": np.exp(-0.4 * np.arange(50)).tolist(),
    "fifty equal": [1.0] * 50,
    "nine rare": [1.0] + [1e-6] * 9,
    "one and two hundred": [0.9] + [0.1 / 199] * 199,
}


def assigned(weights, num_rows) -> tuple[Proportions, np.ndarray]:
    owed = Proportions(np.array(weights, dtype=float), num_rows)
    return owed, np.concatenate(list(assign_sources(owed)))


def worst_error(owed: Proportions, sources: np.ndarray) -> float:
    due = owed.owed(np.arange(1, len(sources) + 1))
    return max(np.abs(np.cumsum(sources == source) - due[:, source]).max() for source in range(owed.num_sources))


def one_after_the_other(owed: Proportions, num_rows: int | None = None) -> np.ndarray:
    """The rule, a row at a time."""
    given, every, found = np.zeros(owed.num_sources), np.arange(owed.num_sources), []
    for row in range(1, min(num_rows or 10**9, int(owed.ends[-1])) + 1):
        may = owed.may(given, every) <= row
        found.append(int(np.where(may, owed.due(given, every), np.inf).argmin()))
        given[found[-1]] += 1
    return np.array(found)


def short_stretches(worth: int = 64):
    """Stretches of few rows, so that a small blend has many."""
    return mock.patch.multiple(chairman, _ROWS=64, _STRETCHES=16, _WORTH=worth)


@pytest.mark.parametrize("weights", SKEWED.values(), ids=SKEWED)
def test_every_prefix_has_its_proportions_to_within_one_row(weights):
    owed, sources = assigned([weights], [30_000])
    assert len(sources) == 30_000
    assert worst_error(owed, sources) <= 1 - owed.slack + 1e-6 if len(weights) > 1 else not sources.any()


WEIGHTS = st.one_of(
    st.lists(st.floats(1e-6, 1), min_size=2, max_size=12),
    st.builds(lambda count, rate: np.exp(-rate * np.arange(count)).tolist(), st.integers(2, 60), st.floats(0.05, 1.5)),
)


# Examples: fewer rows than sources; a source that is never due again; the last row of a stretch, and the next one.
@settings(derandomize=True, deadline=None, max_examples=25)
@example([0.5, 0.5], 1, 0, True)
@example(np.exp(-1.5 * np.arange(29)).tolist(), 1, 1, False)
@example(SKEWED["fifty by factors"], 2500, 1250, True)
@example(SKEWED["fifty by factors"], 65, 64, False)
@given(WEIGHTS, st.integers(1, 1500), st.integers(0, 1500), st.booleans())
def test_no_weights_and_no_change_of_weights_put_a_source_off_by_one_row(weights, num_rows, before, foresees):
    """Nor does it matter how rows were guessed, or where a stretch begins."""
    reversed_ = [weights[::-1]] if before else []
    blends, counts = [*reversed_, weights], [before, num_rows] if before else [num_rows]
    with short_stretches(worth=-1 if foresees else 64):
        owed, sources = assigned(blends, counts)
    assert worst_error(owed, sources) < 1
    assert np.array_equal(sources[:200], one_after_the_other(owed, 200))


@pytest.mark.parametrize("weights", [SKEWED["fifty by factors"], SKEWED["nine rare"], [0.2, 0.3, 0.5]])
def test_stretches_side_by_side_are_one_run(weights, monkeypatch):
    """Also where the guesses are bad, so that stretches are run again."""
    expected = one_after_the_other(Proportions(np.array([weights]), [3000]))
    for worth in (64, -1):
        with short_stretches(worth):
            assert np.array_equal(assigned([weights], [3000])[1], expected)
    monkeypatch.setattr(Proportions, "guess", lambda owed, rows, earlier: np.floor(owed.owed(rows)))
    with short_stretches():
        assert np.array_equal(assigned([weights], [3000])[1], expected)


def test_rare_sources_are_foreseen():
    """So fewer stretches of a blend of steep weights are run again."""
    counts, repair = [], stretches._repair
    with mock.patch.object(stretches, "_repair", lambda *a: counts.append(len(a[2])) or repair(*a)):
        for worth in (10**9, -1):
            counts.append("begin")
            with mock.patch.multiple(chairman, _ROWS=1024, _STRETCHES=128, _WORTH=worth):
                assigned([SKEWED["fifty by factors"]], [400_000])
    plain, foreseen = (sum(part) for part in split(counts, "begin"))
    assert 0 < foreseen < 0.6 * plain


def split(items: list, mark: str) -> list[list]:
    parts: list[list] = []
    for item in items:
        if item == mark:
            parts.append([])
        else:
            parts[-1].append(item)
    return parts


def test_memory_does_not_grow_with_the_sources(monkeypatch):
    """Fewer stretches run side by side."""
    monkeypatch.setattr(chairman, "_NUMBERS", 200)
    monkeypatch.setattr(chairman, "_ROWS", 64)
    seen, run = [], chairman.run_stretches
    monkeypatch.setattr(chairman, "run_stretches", lambda *args: seen.append(len(args[2])) or run(*args))
    owed, sources = assigned([SKEWED["fifty equal"]], [1000])
    assert max(seen) == 4 and np.array_equal(sources, one_after_the_other(owed))


def test_a_schedule_has_its_proportions_across_its_blends():
    weights = [[0.2, 0.3, 0.5, 0, 0], [0, 0.1, 0.1, 0.3, 0.5], [0.9] + [0.025] * 4]
    owed, sources = assigned(weights, [701, 1213, 999])
    assert worst_error(owed, sources) < 1
    assert np.array_equal(sources, one_after_the_other(owed))
    assert not np.isin(sources[:700], (3, 4)).any() and (sources[702:1914] == 0).sum() <= 1

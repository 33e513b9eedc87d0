"""Which tests one worker runs together."""

from __future__ import annotations

import pytest


pytest.importorskip("xdist")
from ..scheduling import group_of


@pytest.mark.parametrize(
    ("test", "group"),
    (
        ("tests/world/test_ranks.py::test_a", "tests/world"),
        ("tests/launch/test_gpu_run.py::test_a[x::y/z]", "tests/launch"),
        ("tests/unit/test_plan.py::test_a", "tests/unit/test_plan.py"),
        ("tests/unit/test_words.py::test_a[@b]", "tests/unit/test_words.py::test_a[@b]"),
    ),
)
def test_tests_that_share_something_stay_together(test, group):
    assert group_of(test) == group

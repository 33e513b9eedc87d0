"""Layers whose state decays: ranks that share rows get the numbers of one process, documents those of each alone."""

from __future__ import annotations

import pytest

from hf_longctx.proof.result import tolerance

from ..recurrences import DOCUMENTS, errors_on_ranks


PACKED = ("packed", sum(DOCUMENTS))
# Rows shorter than a convolution, that do not divide, and padded on each side.
KINDS = [("dense", 7), ("left", 45), ("right", 45), PACKED]


def assert_exact(answers: list) -> None:
    """Up to what `hf-longctx verify` allows its rows, or to what another chunk size changes on one process."""
    for kind, tokens, noise, error, name in sum(answers, []):
        assert error <= max(tolerance(46), noise), f"{kind} rows of {tokens} tokens: {name} is off by {error:.1e}"


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_h1", "falcon_mamba", "minimax", "recurrent_gemma"])
def test_two_ranks_get_the_numbers_of_one_process(world2, model_type):
    assert_exact(world2.run(errors_on_ranks, model_type, KINDS, 2))


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "zamba"])
def test_four_ranks_and_layers_that_are_recomputed(world4, model_type):
    assert_exact(world4.run(errors_on_ranks, model_type, [("dense", 23), PACKED], 4, True))


def test_groups_of_ranks_do_not_meet(world4):
    assert_exact(world4.run(errors_on_ranks, "bamba", [("dense", 23), PACKED], 2))

"""Vectors of spans against a loop over spans: every mode, values and gradients, whole rows and pieces of rows."""

from __future__ import annotations

import pytest
import torch

from hf_longctx.parallel.pooling import Spans, pool_spans

from ..pooling import LAYOUTS, TOKENS, gradient, modes_of, pool_by_loop, random_hidden, random_upstream, spans_of


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-14), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mode_equals_a_loop_over_spans(layout, width, dtype, allowed):
    hidden, spans, modes = random_hidden(width, dtype).requires_grad_(), spans_of(layout), modes_of(layout)
    for chosen in (modes, modes[::-1], *((mode,) for mode in modes)):
        actual = pool_spans(hidden, spans, chosen)
        expected = [pool_by_loop(hidden, spans, mode) for mode in chosen]
        upstream = random_upstream(expected, seed=len(chosen))
        actual.append(gradient(actual, upstream, hidden))
        expected.append(gradient(expected, upstream, hidden))
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed)


@pytest.mark.parametrize("pieces", [(6, 5), (3, 3, 3, 2), (1,) * TOKENS, (0, 4, 0, 7, 0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_of_a_row_add_up_to_the_row(layout, pieces):
    """What each rank contributes, without a group: all but the maximum is a sum over ranks."""
    hidden, spans, modes = random_hidden(5, torch.float64).requires_grad_(), spans_of(layout), modes_of(layout)
    first, parts = 0, []
    for length in pieces:
        parts.append(pool_spans(hidden[first : first + length], spans, modes, first_token=first))
        first += length
    wholes = {
        mode: torch.stack(shares).amax(0) if mode == "max" else torch.stack(shares).sum(0)
        for mode, *shares in zip(modes, *parts, strict=True)
    }
    expected = {mode: pool_by_loop(hidden, spans, mode) for mode in modes}
    torch.testing.assert_close(wholes, expected, rtol=0, atol=1e-14)
    sums, expected_sums = ([made[mode] for mode in modes if mode != "max"] for made in (wholes, expected))
    upstream = random_upstream(expected_sums, seed=1)
    flowed = [gradient(vectors, upstream, hidden) for vectors in (sums, expected_sums)]
    torch.testing.assert_close(*flowed, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len_tokens", "weightedmean", "max", "cls", "lasttoken"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, mode):
    """4096 equal tokens: a sum in half precision would stop growing long before the end."""
    hidden = torch.full((4096, 2), 1.5, dtype=dtype)
    spans = Spans(*(torch.tensor([number]) for number in (0, 4096, 0)))
    vectors = pool_spans(hidden, spans, (mode,))[0]
    wanted = 1.5 * 64 if mode == "mean_sqrt_len_tokens" else 1.5
    assert vectors.dtype == dtype and vectors.tolist() == [[wanted, wanted]]


def test_tokens_that_share_a_maximum_share_its_gradient_evenly():
    hidden = torch.tensor([[2.0], [1.0], [2.0], [2.0], [5.0]], requires_grad=True)
    spans = Spans(*(torch.tensor(numbers) for numbers in ([0, 3], [4, 5], [0, 3])))
    vectors = pool_spans(hidden, spans, ("max",))
    assert vectors[0].tolist() == [[2.0], [5.0]]
    assert gradient(vectors, [torch.tensor([[3.0], [7.0]])], hidden).flatten().tolist() == [1, 0, 1, 1, 7]


@pytest.mark.parametrize(("skipped", "starts"), [(0, [0, 4, 5]), (1, [1, 5, 6]), (3, [3, 5, 8]), (9, [4, 5, 11])])
def test_spans_of_documents_leave_out_a_prompt_and_never_more(skipped, starts):
    spans = Spans.of_documents(torch.tensor([0, 4, 5, 11], dtype=torch.int32), skipped)
    assert (spans.starts.tolist(), spans.ends.tolist(), spans.origins.tolist()) == (starts, [4, 5, 11], [0, 4, 5])

"""Torch's own chunked loss next to ours: the same numbers where it can be compared, and what keeps ours in use.

A failure of the second half means that torch has changed: run `recipes/bench/linear_cross_entropy.py` again, and call
torch's from `tiled_cross_entropy` where it is no longer worse (`docs/benchmarks/linear_cross_entropy_cpu.md`).
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from hf_longctx.losses.tiled_logits import tiled_cross_entropy

from .test_tiled_logits import TOLERANCE, assert_same, error_of, gradients, stock_loss, tensors


pytestmark = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="`linear_cross_entropy` came with torch 2.13"
)
TILE = 8


def torchs(hidden, weight, labels, *, bias=None, num_items=1, chunk: int | None = TILE, **options):
    """Torch's, in chunks of our tile's size or, with `None`, of its own choice."""
    settings = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    total = F.linear_cross_entropy(
        hidden, weight, labels, linear_bias=bias, options=settings, **{"reduction": "sum", **options}
    )
    return total / num_items


# The same numbers


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", [1, TILE, 64, None])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_loss_and_gradients_are_the_same(with_bias, chunk, dtype):
    hidden, weight, bias, labels = tensors(dtype)
    bias = bias if with_bias else None
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    theirs = torchs(hidden, weight, labels, bias=bias, num_items=17, chunk=chunk)
    ours = tiled_cross_entropy(hidden, weight, labels, bias=bias, num_items=17, tile_size=chunk)
    assert_same([ours, *gradients(ours, inputs)], [theirs, *gradients(theirs, inputs)], TOLERANCE[dtype])


def test_the_mean_and_another_ignore_index_are_the_same():
    hidden, weight, bias, labels = tensors(torch.float64)
    labels[labels == -100] = 7
    inputs = (hidden, weight, bias)
    theirs = torchs(hidden, weight, labels, bias=bias, reduction="mean", ignore_index=7)
    ours = tiled_cross_entropy(hidden, weight, labels, bias=bias, ignore_index=7, tile_size=TILE)
    assert_same([ours, *gradients(ours, inputs)], [theirs, *gradients(theirs, inputs)], 1e-13)


@pytest.mark.parametrize("loss_of", [tiled_cross_entropy, torchs], ids=["ours", "torch's"])
def test_what_both_do(loss_of):
    """Runs are equal to the bit, a frozen weight gets no gradient, hooks run once, a second backward is refused."""
    hidden, weight, bias, labels = tensors()
    first, second = (gradients(loss_of(hidden, weight, labels, bias=bias), (hidden, weight, bias)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))
    frozen, calls = weight.detach(), []
    loss_of(hidden, frozen, labels, bias=bias).backward()
    assert frozen.grad is None and hidden.grad is not None
    weight.register_hook(lambda gradient: calls.append(gradient))
    loss = loss_of(hidden, weight, labels, bias=bias)
    loss.backward(retain_graph=True)
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


# What keeps ours in use


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_digits_of_the_loss_and_of_the_gradient_of_the_weight(dtype):
    hidden, weight, bias, labels = tensors(dtype, tokens=1024, words=64, width=16)
    inputs, exact = (hidden, weight, bias), [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = stock_loss(exact[0] @ exact[1].T + exact[2], labels, num_items=1)
    wanted = torch.autograd.grad(expected, exact)
    losses, errors = {}, {}
    for loss_of in (tiled_cross_entropy, torchs):
        size = {"tile_size": TILE} if loss_of is tiled_cross_entropy else {"chunk": TILE}
        loss = losses[loss_of] = loss_of(hidden, weight, labels, bias=bias, num_items=1, **size)
        found = torch.autograd.grad(loss, inputs)
        errors[loss_of] = [error_of(x.double(), y) for x, y in zip(found, wanted)]
    assert losses[tiled_cross_entropy].dtype == torch.float32 and losses[torchs].dtype == dtype
    ours, theirs = (abs(losses[which].item() / expected.item() - 1) for which in (tiled_cross_entropy, torchs))
    assert ours < theirs / 2, (ours, theirs)
    assert errors[tiled_cross_entropy][1] < errors[torchs][1] / 2, errors


def test_autocast_is_not_followed():
    hidden, weight, _, labels = tensors()
    found = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext():
            found[enabled] = [f(hidden, weight, labels, num_items=1).item() for f in (tiled_cross_entropy, torchs)]
    assert found[False][1] == found[True][1], "torch's multiplies in float32 as before"
    assert found[False][0] != found[True][0], "ours multiplies in bfloat16, as a head under autocast does"


def test_ignored_labels_are_computed():
    """A hidden state that is not a number shows whether it was read: 0 times it is not 0."""
    hidden, weight, _, labels = tensors()
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    assert tiled_cross_entropy(hidden, weight, labels, tile_size=TILE).isfinite()
    assert torchs(hidden, weight, labels).isnan()


def test_a_masked_word_0_and_an_ignored_label_are_not_a_number():
    hidden, weight, bias, labels = tensors()
    with torch.no_grad():
        bias[0] = -torch.inf
    labels[labels == 0] = 1
    assert tiled_cross_entropy(hidden, weight, labels, bias=bias).isfinite()
    assert torchs(hidden, weight, labels, bias=bias).isnan()


def test_label_smoothing_makes_whole_logits_with_a_warning():
    hidden, weight, _, labels = tensors(torch.float64)
    with pytest.warns(UserWarning, match="`options`` ignored"):
        theirs = torchs(hidden, weight, labels, label_smoothing=0.1)
    ours = tiled_cross_entropy(hidden, weight, labels, label_smoothing=0.1, num_items=1, tile_size=TILE)
    assert_same([ours], [theirs], 1e-13)


def test_a_batch_of_rows_is_not_taken():
    hidden, weight, _, labels = tensors()
    rows, targets = hidden.view(3, 21, -1), labels.view(3, 21)
    assert tiled_cross_entropy(rows, weight, targets).isfinite()
    with pytest.raises(RuntimeError, match="dimensionality 1 or 2"):
        torchs(rows, weight, targets)


def test_no_valid_label_is_not_a_number_in_the_mean():
    hidden, weight, _, labels = tensors()
    none = torch.full_like(labels, -100)
    assert tiled_cross_entropy(hidden, weight, none) == 0 and torchs(hidden, weight, none) == 0
    assert torchs(hidden, weight, none, reduction="mean").isnan()

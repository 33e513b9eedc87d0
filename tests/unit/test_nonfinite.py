"""Which losses and gradients make a step that is taken: those of which all numbers, and the norm, are finite."""

from __future__ import annotations

import math

import pytest
import torch

from hf_longctx.resilience.nonfinite import has_finite_step


def step(gradients: list[float | None], losses: list[float], dtype: torch.dtype = torch.float32) -> bool:
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in gradients])
    for parameter, value in zip(model, gradients):
        if value is not None:
            parameter.grad = torch.tensor([0.0, value, 1.0], dtype=dtype)
    return bool(has_finite_step(model, [torch.tensor(loss, dtype=dtype) for loss in losses]))


@pytest.mark.parametrize(
    ("gradients", "losses", "is_finite"),
    [
        ([1.0, 2.0], [0.5], True),
        ([1.0, None], [0.5, 0.0], True),
        ([None, None], [0.5], True),
        ([], [0.5], True),
        ([1.0, math.nan], [0.5], False),
        ([-math.inf, 1.0], [0.5], False),
        ([1.0, 2.0], [0.5, math.nan], False),
        ([1.0, 2.0], [math.inf, 0.5], False),
        ([None, None], [math.nan], False),
        ([1e18, 1e18], [0.5], True),
        ([1e20, 1.0], [0.5], False),  # its own square overflows
        ([1.5e19, 1.5e19], [0.5], False),  # only their sum of squares does
        ([1.0, 2.0], [1e38, 1e38], True),  # losses are looked at one by one
    ],
)
def test_every_loss_every_gradient_and_the_norm_must_be_finite(gradients, losses, is_finite):
    assert step(gradients, losses) is is_finite


@pytest.mark.parametrize(
    ("gradient", "loss", "dtype", "is_finite"),
    [
        (1e50, 1e50, torch.float64, True),
        (1e200, 0.5, torch.float64, False),
        (6e4, 0.5, torch.float16, True),
        (1e30, 0.5, torch.bfloat16, False),
    ],
)
def test_what_overflows_depends_on_the_type_of_the_gradient(gradient, loss, dtype, is_finite):
    assert step([gradient], [loss], dtype) is is_finite


@pytest.mark.parametrize("value", [1e20, 1.0])
def test_the_norm_is_the_one_by_which_the_trainer_clips(value):
    """Clipping to a norm of `inf` makes every gradient 0: what is refused is what would be lost."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), value)
    model = torch.nn.ParameterList([parameter])
    refused = not has_finite_step(model, [torch.tensor(1.0)])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert refused is bool((parameter.grad == 0).all())

"""The step of the fast weights, and what training differentiates of it, in few passes over them.

The matrices are large beside a chunk's tokens, so each pass over them costs as much as a product with the tokens.
Price: forward reads a gradient twice and writes the weights once; backward reads both twice and writes one gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from .prime import Fast


def clipped_step(fast: Fast, gradients: Fast, learning_rate: float, max_grad_norm: float) -> tuple[Fast, torch.Tensor]:
    """`fast` minus `learning_rate` times `gradients`, each row's clipped by its norm over all matrices.

    Args:
        fast, gradients (`list` of `torch.Tensor`): with rows first; a gradient without a graph is a constant.
        learning_rate, max_grad_norm (`float`).

    Returns:
        Fast weights after the step, and the squared norm of each gradient, `(matrices, B)`, without a graph.
    """
    squares, *after = _ClippedStep.apply(learning_rate, max_grad_norm, len(fast), *fast, *gradients)
    return after, squares


class _ClippedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rate: float, most: float, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fast, gradients = tensors[:count], tensors[count:]
        squares = torch.stack([_row_dots(gradient, gradient) for gradient in gradients])
        whole = squares.sum(0)
        size = _step_size(whole, rate, most)
        ctx.set_materialize_grads(False)
        ctx.count, ctx.rate, ctx.most = count, rate, most
        ctx.save_for_backward(whole, *gradients)
        ctx.mark_non_differentiable(squares)
        return squares, *(torch.addcmul(w, -_wide(size), g) for w, g in zip(fast, gradients, strict=True))

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor | None, *outer: torch.Tensor | None) -> tuple:
        whole, *gradients = ctx.saved_tensors
        found: list[torch.Tensor | None] = [None] * ctx.count
        if any(ctx.needs_input_grad[3 + ctx.count :]) and any(out is not None for out in outer):
            with torch.autocast(whole.device.type, enabled=False):
                found = _backward(ctx, whole, gradients, outer)
        return None, None, None, *outer, *found


def _backward(ctx: Any, whole: torch.Tensor, gradients: list[torch.Tensor], outer: tuple) -> list:
    """What goes back to each gradient. A clipped step does not change with the length of a gradient."""
    if torch.is_grad_enabled():  # a second derivative needs the norm's own graph
        whole = torch.stack([_row_dots(gradient, gradient) for gradient in gradients]).sum(0)
    size, over = _step_size(whole, ctx.rate, ctx.most), whole > ctx.most**2
    along = torch.stack([_row_dots(out, g) for out, g in zip(outer, gradients, strict=True) if out is not None]).sum(0)
    factor = _wide(torch.where(over, size * along / torch.where(over, whole, 1), 0))
    found = []
    for out, gradient in zip(outer, gradients, strict=True):
        back = factor * gradient
        found.append(back if out is None else torch.addcmul(back, -_wide(size), out))
    return found


def _step_size(whole: torch.Tensor, rate: float, most: float) -> torch.Tensor:
    """What each row's gradient is multiplied by; `whole` is its squared norm."""
    over = whole > most**2
    scale = torch.where(over, most / torch.where(over, whole, 1).sqrt(), 1)
    # A norm that is not finite must not be lost in a division by it: the difference is 0, or not a number.
    return rate * scale + (whole - whole).detach()


def _wide(rows: torch.Tensor) -> torch.Tensor:
    return rows[:, None, None]


def _row_dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The inner product of each row's two matrices, `(B,)`."""
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).view(-1)

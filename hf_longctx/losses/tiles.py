"""What the tiled losses share: valid tokens in tiles, the rule from logits to a loss, a gradient made in the forward.

A tile is a few hundred tokens with the logits of the whole vocabulary. `TokenLoss` turns them into losses and, in
place, into the gradient of their sum, so that a tile is one tensor and not the four of a stock cross entropy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable


# Entries of one tile of logits: 512 tokens of 128K words, 256 MiB in fp32. Fewer tokens cost more time a token, since
# every tile reads all weights; more gain little (`recipes/bench/tiled_loss.py --tile_sizes`).
TILE_ENTRIES = 2**26
MIN_TILE_TOKENS = 64


def validate_tile_size(tile_size: object) -> None:
    """Raise `ValueError` unless `tile_size` is `None` or a positive integer."""
    if tile_size is None or (isinstance(tile_size, int) and not isinstance(tile_size, bool) and tile_size > 0):
        return
    raise ValueError(
        f"`tile_size` ({tile_size!r}) must be a positive integer: it is the number of tokens whose logits exist at a "
        "time; leave it out for a size that fits the vocabulary."
    )


def choose_tile_size(tile_size: int | None, num_classes: int) -> int:
    """Tokens of one tile: as asked, or about `TILE_ENTRIES` logits and at least `MIN_TILE_TOKENS` tokens."""
    return tile_size or max(MIN_TILE_TOKENS, TILE_ENTRIES // num_classes)


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """How the logits of one token become its loss; see [`tiled_cross_entropy`] for the fields."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"`label_smoothing` ({self.label_smoothing!r}) must be between 0 and 1: it is the share of the target "
                "that is spread over all words."
            )
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"`z_loss` ({self.z_loss!r}) must be a number of at least 0; use 0 to switch it off.")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(
                f"`scale` ({self.scale!r}) must be a number other than 0: logits are multiplied by it; use 1 for none."
            )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"`softcap` ({self.softcap!r}) must be a positive number; use `None` for no cap.")

    def overwrite(self, logits: torch.Tensor, targets: torch.Tensor, with_gradient: bool) -> torch.Tensor:
        """The loss of every token; `logits` become the gradient of the losses' sum, or else are spent.

        Args:
            logits (`torch.Tensor` of shape `(n, V)`): as the head made them, in fp32 or fp64.
            targets (`torch.Tensor` of shape `(n,)`): valid labels.
            with_gradient (`bool`): whether the gradient is needed.

        Returns:
            `torch.Tensor` of shape `(n,)`.

        Memory: with a softcap and a gradient one more tensor of the size of `logits`, otherwise none.
        """
        z, target = logits, targets[:, None]
        slope = self.transform(z, with_gradient)
        smoothing, largest = self.label_smoothing, z.amax(1, keepdim=True)
        on_target = z.sub_(largest).gather(1, target)
        mean = z.mean(1, keepdim=True) if smoothing else 0.0
        total = z.exp_().sum(1, keepdim=True)
        log_total = largest + total.log()
        losses = total.log() - (1 - smoothing) * on_target - smoothing * mean + self.z_loss * log_total.square()
        if with_gradient:
            z.mul_((1 + 2 * self.z_loss * log_total) / total)
            if smoothing:
                z.sub_(smoothing / z.shape[1])
            z.scatter_(1, target, z.gather(1, target) - (1 - smoothing))
            self.undo(z, slope)
        return losses.squeeze(1)

    def transform(self, z: torch.Tensor, with_slope: bool) -> torch.Tensor | None:
        """Scale and cap `z` in place; return the slope of the cap where it is asked for and not 1."""
        if self.scale != 1:
            z.mul_(self.scale)
        if self.softcap is None:
            return None
        z.div_(self.softcap).tanh_()
        slope = z.square().neg_().add_(1) if with_slope else None
        z.mul_(self.softcap)
        return slope

    def undo(self, gradient: torch.Tensor, slope: torch.Tensor | None) -> None:
        """From the gradient of transformed logits to that of the head's, in place."""
        if slope is not None:
            gradient.mul_(slope)
        if self.scale != 1:
            gradient.mul_(self.scale)


@dataclass(frozen=True)
class ValidTokens:
    """The tokens that count: their indices among all tokens, their labels, and how they fall into tiles."""

    places: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor, ignore_index: int, device: torch.device) -> ValidTokens:
        labels = labels.reshape(-1).to(device)
        places = (labels != ignore_index).nonzero().squeeze(1)
        return cls(places, labels[places])

    def __len__(self) -> int:
        return len(self.places)

    def tiles(self, tile_size: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Of each tile: its range among the valid tokens, their indices and their targets."""
        for start in range(0, len(self), tile_size):
            part = slice(start, min(start + tile_size, len(self)))
            yield part, self.places[part], self.targets[part]

    def write(self, losses: torch.Tensor, into: torch.Tensor | None) -> None:
        """Write the losses of the valid tokens into a tensor of all tokens, where one is wanted."""
        if into is not None:
            into.view(-1)[self.places] = losses.to(into)

    def mean(self, total: torch.Tensor, num_items: torch.Tensor | float | None) -> torch.Tensor:
        """`total` divided by `num_items`, or by the number of valid tokens (by 1 if there is none)."""
        if num_items is None:
            num_items = max(len(self), 1)
        elif isinstance(num_items, torch.Tensor):
            num_items = num_items.to(total.device)
        return total / num_items


def validate_hidden(hidden: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise `ValueError` unless there is one integer label for every hidden state."""
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, but `hidden` of shape {tuple(hidden.shape)} needs one label a "
            f"token, {tuple(hidden.shape[:-1])}: pass labels already shifted, of the same tokens."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` ({labels.dtype}) must be integers: convert them with `labels.long()`.")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where losses and sums over tiles are kept: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A block in which every operation keeps the precision of its arguments."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


Compute = Callable[[Sequence[torch.Tensor | None], Sequence[bool]], tuple[torch.Tensor, list[torch.Tensor | None]]]


def sum_with_gradient(compute: Compute, *tensors: torch.Tensor | None) -> torch.Tensor:
    """A scalar of `tensors` whose gradients are made together with it and wait for the backward.

    Args:
        compute (`Callable`): `(tensors, needs) -> (scalar, gradients)`; a gradient that is not needed is `None`.
        tensors (`torch.Tensor`, *optional*): what the scalar may be differentiated by; each gets its gradient once.

    Gradient: those of `compute`, times the upstream scalar; one backward only.
    Memory: the gradients are held from forward to backward, and handed out without a copy.
    """
    needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]
    if any(needs):
        return _GradientInForward.apply(compute, needs, *tensors)
    with torch.no_grad():
        return compute(tensors, needs)[0]


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute: Compute, needs: Sequence[bool], *tensors):
        scalar, ctx.gradients = compute(tensors, needs)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return scalar

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # Passed on, not copied: the wrapper's hooks and the optimizer then hold the only one.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradient of a tiled loss was asked for twice, but it is made once, in the forward, and handed "
                "out: add the losses up and run one backward, or run the forward again."
            )
        return None, None, *(_scaled(gradient, dtype, upstream) for gradient, dtype in zip(gradients, ctx.dtypes))


def _scaled(gradient: torch.Tensor | None, dtype: torch.dtype, factor: torch.Tensor) -> torch.Tensor | None:
    """A gradient times a scalar, in the precision of its tensor: in place, or without a wide copy between."""
    if gradient is None:
        return None
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))

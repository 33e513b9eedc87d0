"""One chunk: losses with the weights as they were, and one step of the fast weights on the chunk's own tokens.

Two losses. The inner one learns from the tokens read (`input_ids` shifted, without padding and `bos`), since while
reading there are no labels. The outer one is the trainer's: it uses `labels`, is taken before the step, and training
differentiates it through all earlier steps.
Price: a forward and a backward of the suffix a chunk, and in training what autograd keeps to differentiate both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..parallel.shard import IGNORE_INDEX
from .clipped_step import clipped_step
from .prime import Fast, PrimeMLPs
from .prime_blocks import Carried, run_suffix


@dataclass(frozen=True)
class Suffix:
    """What runs chunk by chunk: the last layers, from the first prime MLP on, final norm and head."""

    layers: list[Any]
    primes: PrimeMLPs
    norm: torch.nn.Module
    head: torch.nn.Module

    def parameters(self) -> list[torch.Tensor]:
        """What is trained of it, without the matrices that fast weights start from."""
        modules = [*self.layers, self.primes, self.norm, self.head]
        starts = {id(matrix) for matrix in self.primes.matrices()}
        unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        return [parameter for key, parameter in unique.items() if key not in starts]


@dataclass(frozen=True)
class Step:
    """The inner step: its size, its clipping, and whether training differentiates through it."""

    learning_rate: float
    max_grad_norm: float
    exact: bool = True


@dataclass(frozen=True)
class Chunk:
    """A chunk's facts that have no gradient. Calling it runs the chunk.

    Args:
        suffix ([`Suffix`]).
        attends (`dict`): mask and positions for attention.
        targets (`torch.Tensor` of shape `(B, t)`): the tokens read next, -100 where a row ends.
        learned (`torch.Tensor` of shape `(B, t)`): which of them the inner loss learns from.
        labels (`torch.Tensor` of shape `(B, t)`, *optional*): targets of the outer loss, or `None` without it.
        labels_agree (`bool`): whether every label that counts is the token read next.
        step ([`Step`], *optional*): `None` for a chunk after which no step is due.
        keeps (`int`): keys and values of the last tokens that the next chunk sees.
        returns_tokens (`bool`): whether hidden states and logits of the chunk are returned.
    """

    suffix: Suffix
    attends: dict[str, Any]
    targets: torch.Tensor
    learned: torch.Tensor
    labels: torch.Tensor | None
    labels_agree: bool
    step: Step | None
    keeps: int
    returns_tokens: bool

    def __call__(self, hidden_states: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it on what left the first attention, `(B, t, D)`, fast weights, and keys and values carried in.

        Returns:
            The outer loss, squared norms `(layers, B)` of the inner gradient, hidden states and logits (empty unless
            asked for), the fast weights after it, and keys and values to carry on.
        """
        count = 3 * len(self.suffix.layers)
        fast, carried = list(tensors[:count]), tensors[count:]
        builds = torch.is_grad_enabled()
        if self.step is not None:
            # `expand` of a parameter says under `no_grad` that it needs a gradient, and is in no graph.
            fast = [w if builds and w.requires_grad else w.detach().requires_grad_() for w in fast]
        before = list(zip(carried[::2], carried[1::2], strict=True))
        keys = [Carried(before[index] if before else None) for index in range(len(self.suffix.layers) - 1)]
        with torch.set_grad_enabled(builds or self.step is not None):
            hidden = run_suffix(self.suffix.layers, self.suffix.primes, hidden_states, self.attends, keys, fast)
            hidden = self.suffix.norm(hidden)
            logits = self.suffix.head(hidden)
            losses = token_losses(logits, self.targets)
            outer = self._outer(logits, losses)
            if self.step is None:
                squares = losses.new_zeros(len(self.suffix.layers), len(losses))
            else:
                fast, squares = take_step(fast, row_means(losses, self.learned), self.step, builds)
        shown = (hidden, logits) if self.returns_tokens else (hidden.new_zeros(0), hidden.new_zeros(0))
        after = [tensor for key in keys for tensor in key.last(self.keeps)]
        outputs = (outer, squares.detach(), *shown, *fast, *after)
        return outputs if builds else tuple(output.detach() for output in outputs)

    def _outer(self, logits: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """Sum over the labels of the chunk."""
        if self.labels is None:
            return losses.new_zeros(())
        if self.labels_agree:
            return torch.where(self.labels != IGNORE_INDEX, losses, 0).sum()
        return token_losses(logits, self.labels).sum()


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of `(B, t, V)` a token, in float32 or wider; 0 where the target is -100."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view(targets.shape)


def row_means(losses: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """The mean over each row's tokens that are learned from, `(B,)`; 0 for a row without any."""
    return torch.where(learned, losses, 0).sum(1) / learned.sum(1).clamp(min=1)


def take_step(fast: Fast, means: torch.Tensor, step: Step, builds: bool) -> tuple[Fast, torch.Tensor]:
    """Fast weights after one step on `means`, `(B,)`, and the squared norm of each layer's gradient, `(layers, B)`.

    Each row's gradient is clipped by its own norm over all layers. Autocast does not apply: the update is in the
    precision of the fast weights.
    """
    exact = builds and step.exact
    with torch.autocast(means.device.type, enabled=False):
        gradients = torch.autograd.grad(means.sum(), fast, create_graph=exact, retain_graph=builds)
        after, each = clipped_step(fast, list(gradients), step.learning_rate, step.max_grad_norm)
        return after, each.view(-1, 3, each.shape[1]).sum(1)

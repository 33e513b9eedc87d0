"""What every check on a tiny batch needs: evaluation mode, ordinary random tokens, and what rounding may leave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rounding:
    """Largest difference that rounding may leave, relative to the largest entry, by precision.

    Args:
        float64 (`float`), float32 (`float`): of these precisions.
        half (`float`): of any shorter one, which keeps two to three digits.
    """

    float64: float
    float32: float
    half: float

    def of(self, dtype: torch.dtype) -> float:
        """For results of this precision."""
        return {torch.float64: self.float64, torch.float32: self.float32}.get(dtype, self.half)


# Both runs add the same numbers; only kernels whose order of summation depends on other rows (grouped experts) leave
# anything at all.
SAME_SUMS = Rounding(float64=1e-9, float32=1e-5, half=1e-2)
# The same numbers, added in another order.
REORDERED_SUMS = Rounding(float64=1e-4, float32=1e-4, half=3e-2)
# One layer on other tokens at a time; a module that mixes tokens differs by about one.
OTHER_TILES = Rounding(float64=1e-9, float32=1e-4, half=3e-2)
# Kernels round differently for rows of other lengths; a wrong position moves an embedding by a tenth and more.
OTHER_ROW_LENGTHS = Rounding(float64=1e-8, float32=1e-4, half=5e-2)


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Run a block without dropout; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def whole_model(model: torch.nn.Module) -> Iterator[None]:
    """[`evaluation_mode`] for a block that runs the whole model, after which FSDP2 has its shards again.

    A forward without a backward leaves the weights of FSDP2's root gathered, and an optimizer that is built next
    would hold those in place of the shards.
    """
    with evaluation_mode(model):
        yield
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "set_requires_gradient_sync"):
            module.reshard()


def vectors_of(outputs) -> torch.Tensor:
    """The logits of a model's outputs, in front of which the loss of its routers may stand, or the first of them."""
    logits = getattr(outputs, "logits", None)
    return outputs[0] if logits is None else logits


def first_ordinary_token(vocab_size: int) -> int:
    """The first token id that is taken for an ordinary one; models may read more than themselves into special ones."""
    return min(10, vocab_size // 2)


def random_tokens(vocab_size: int, *shape: int) -> torch.Tensor:
    """The same ordinary random token ids on every rank.

    Args:
        vocab_size (`int`): of the model.
        shape (`int`): of the result.

    Returns:
        `torch.Tensor` of the given shape, int64, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randint(first_ordinary_token(vocab_size), min(vocab_size, 1000), shape, generator=generator)


def as_leaf(output, found: list[torch.Tensor]):
    """What an embedding returned, with its vectors as a leaf of the graph, for a hook on its forward.

    Args:
        output (`torch.Tensor` or `tuple`): the vectors, or a tuple that begins with them (I-BERT's has a scale).
        found (`list`): gets the leaf.

    Returns:
        the same with a copy of the leaf, which models may overwrite.
    """
    embedded, *others = (output,) if isinstance(output, torch.Tensor) else output
    found.append(embedded.detach().requires_grad_())
    copied = found[-1].clone()
    return (copied, *others) if others else copied

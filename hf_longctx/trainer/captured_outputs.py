"""What a model returns while a loss is computed: taken out of its graph, and the same on a share as on whole rows.

Hooks on the model run it without gradients and replace each floating-point output by a leaf, so that the gradient of
a loss by the model's outputs is known without a backward through the model; wrappers that shard weights are not
involved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch


class CapturedOutputs:
    """A context in which the outputs of `model` are leaves.

    Args:
        model (`torch.nn.Module`): hooked for the time of the block.
        whole ([`CapturedOutputs`], *optional*): of the same calls on whole rows. What it has for each token is cut to
            this share and returned instead of what the model computed, so that both losses read the same numbers.
        shape (`tuple`, *optional*): rows and tokens of the whole rows.
        local_len (`int`, *optional*): tokens of a row on this rank.
        rank (`int`, *optional*): which share is mine.
    """

    def __init__(
        self, model, whole: CapturedOutputs | None = None, shape=(), local_len: int = 0, rank: int = 0
    ) -> None:
        self.model, self.whole, self.shape, self.local_len, self.rank = model, whole, shape, local_len, rank
        self.calls: list[list[tuple[bool, torch.Tensor, torch.Tensor]]] = []
        self._modes: list[bool] = []
        self.error = 0.0  # of what the model computed for this share, relative to the largest entry

    def __enter__(self) -> CapturedOutputs:
        self._handles = [
            self.model.register_forward_pre_hook(self._before),
            self.model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def leaves(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every output: the whole rows' tensor that it belongs to, and the leaf."""
        return [(like, leaf) for call in self.calls for _, like, leaf in call]

    def layout(self) -> list[int]:
        """How many outputs each call has."""
        return [len(call) for call in self.calls]

    def gradients(self, loss: object) -> list[tuple[bool, torch.Tensor | None]]:
        """For each leaf, whether it has one entry a token, and the gradient of `loss` by it."""
        leaves = [leaf for call in self.calls for _, _, leaf in call]
        kinds = [of_tokens for call in self.calls for of_tokens, _, _ in call]
        found: list[torch.Tensor | None] = [None] * len(leaves)
        if leaves and isinstance(loss, torch.Tensor) and loss.requires_grad:
            found = list(torch.autograd.grad(loss.sum(), leaves, allow_unused=True))
        return list(zip(kinds, found))

    def as_tokens(self, value: torch.Tensor) -> torch.Tensor:
        """Whole rows' outputs as `(B, T, ...)`: some heads leave out the last token, and routers flatten rows."""
        rows, tokens = self.shape
        if value.dim() and value.shape[0] == rows * tokens:
            value = value.unflatten(0, (rows, tokens))
        missing = tokens - value.shape[1]
        return torch.nn.functional.pad(value, [0, 0] * (value.dim() - 2) + [0, missing]) if missing else value

    def as_share(self, value: torch.Tensor) -> torch.Tensor:
        """A share's outputs as `(B, t, ...)`."""
        return value if value.shape[:2] == (self.shape[0], self.local_len) else value.unflatten(0, (self.shape[0], -1))

    def _before(self, module: torch.nn.Module, args: tuple) -> None:
        self._modes.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def _after(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        torch.set_grad_enabled(self._modes.pop())
        call: list[tuple[bool, torch.Tensor, torch.Tensor]] = []
        number = len(self.calls)
        self.calls.append(call)
        known = self.whole.calls[number] if self.whole is not None and number < len(self.whole.calls) else []

        def visit(value: torch.Tensor) -> torch.Tensor:
            like = known[len(call)][2] if len(call) < len(known) else None
            of_tokens = like is not None and self._has_tokens(like, value)
            given = value
            if like is not None and of_tokens:
                given = self._cut(like, value)
                self._compare(value, given, like)
            precise = given.detach() if given.dtype == torch.float64 else given.detach().float()
            with torch.enable_grad():
                leaf = precise.clone().requires_grad_()
                call.append((of_tokens, leaf if like is None else like, leaf))
            return leaf.clone()  # which a loss may change in place

        return _replace(output, visit)

    def _has_tokens(self, whole: torch.Tensor, part: torch.Tensor) -> bool:
        (rows, tokens), local = self.shape, self.local_len
        by_rows = part.dim() >= 2 and part.shape[:2] == (rows, local) and whole.dim() == part.dim()
        by_rows = by_rows and whole.shape[0] == rows and whole.shape[1] in (tokens, tokens - 1)
        flat = part.dim() >= 1 and part.shape[0] == rows * local and whole.shape[:1] == (rows * tokens,)
        return by_rows or flat

    def _compare(self, value: torch.Tensor, given: torch.Tensor, like: torch.Tensor) -> None:
        rows, tokens = self.shape
        known = min(like.shape[1], tokens) if like.dim() > 1 and like.shape[0] == rows else tokens
        real = slice(0, max(known - self.rank * self.local_len, 0))
        difference = (self.as_share(value).to(like.dtype) - self.as_share(given))[:, real].abs()
        if difference.numel():
            self.error = max(self.error, float(difference.max() / like.detach().abs().max().clamp(min=1e-12)))

    def _cut(self, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        value = self.as_tokens(whole.detach())[:, self.rank * self.local_len :][:, : self.local_len]
        missing = self.local_len - value.shape[1]
        value = torch.nn.functional.pad(value, [0, 0] * (value.dim() - 2) + [0, missing]) if missing else value
        return value.reshape(part.shape)


def _replace(output: Any, visit: Callable) -> Any:
    """`output` with `visit` applied to each floating-point tensor in it."""
    if isinstance(output, torch.Tensor):
        return visit(output) if output.is_floating_point() else output
    if isinstance(output, Mapping):
        replaced: Any = copy.copy(output)
        for key in list(output):
            if output[key] is not None:
                replaced[key] = _replace(output[key], visit)
        return replaced
    if type(output) in (tuple, list):
        return type(output)(_replace(each, visit) for each in output)
    return output

"""The tiled cross entropy for any head: adapters, several layers, hooks, whatever maps `(n, D)` to `(n, V)`.

How: a plain linear layer goes to `tiled_cross_entropy`. Every other head is run as it is on one tile of hidden states
after the other, each with a small graph of its own that is followed back at once; the gradients of its parameters add
up in fp32. Price: that of autograd inside a tile, and dropout in the head draws tile by tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..parallel.shard import IGNORE_INDEX
from .tiled_logits import tiled_cross_entropy
from .tiles import (
    MIN_TILE_TOKENS,
    TokenLoss,
    ValidTokens,
    choose_tile_size,
    sum_with_gradient,
    validate_hidden,
    validate_tile_size,
    wide_dtype,
)


Forward = Callable[[torch.Tensor], torch.Tensor]


def tiled_head_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    labels: torch.Tensor,
    *,
    tile_size: int | None = None,
    num_items: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    finish: Forward | None = None,
) -> torch.Tensor:
    """Cross entropy of `head(hidden)` with `labels`, never holding more than one tile of logits.

    Args:
        hidden (`torch.Tensor` of shape `(..., D)`): what the head would be given.
        head (`torch.nn.Module`): maps `(n, D)` to `(n, V)`, every token on its own.
        labels (`torch.Tensor` of shape `(...)`): the target of every token: already shifted.
        tile_size, num_items, label_smoothing, z_loss, scale, softcap, ignore_index: see [`tiled_cross_entropy`].
        finish (`Callable`, *optional*): `(n, V)` logits to `(n, V')`, before scale and softcap; for what a model does
            behind its head and `scale` and `softcap` cannot say.

    Returns:
        `torch.Tensor`: a scalar in fp32, or in fp64 if the logits are; 0 where no token is valid.

    Raises:
        ValueError: the head does not return one vector a token, or settings do not fit together.

    Relations: [`tiled_cross_entropy`], which runs at once if `head` is a `torch.nn.Linear` with nothing attached.
    Normalization: by `num_items`.
    Gradient: of `hidden` and of the head's trainable parameters, each once. Parameters that `finish` alone reads get
    none. One backward only.
    Memory: what the head holds for one tile, one tile of logits in fp32, and the gradients.
    Communication: none.
    """
    settings: dict[str, Any] = {"tile_size": tile_size, "num_items": num_items, "ignore_index": ignore_index}
    settings |= {"label_smoothing": label_smoothing, "z_loss": z_loss, "scale": scale, "softcap": softcap}
    if finish is None and is_linear(head) and "forward" not in vars(head) and not has_hooks(head):
        return tiled_cross_entropy(hidden, head.weight, labels, bias=head.bias, **settings)
    return forward_loss(hidden, head, head, labels, finish=finish, **settings)


def forward_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    forward: Forward,
    labels: torch.Tensor,
    *,
    tile_size: int | None,
    num_items: torch.Tensor | float | None,
    ignore_index: int = IGNORE_INDEX,
    finish: Forward | None = None,
    token_losses: torch.Tensor | None = None,
    **rule,
) -> torch.Tensor:
    """[`tiled_head_loss`] with logits from `forward`, for a caller that already stands inside the call of `head`.

    Its hooks have run then, and must not run again with every tile.
    """
    validate_tile_size(tile_size)
    token_loss = TokenLoss(**rule)
    validate_hidden(hidden, labels)
    parameters = {name: p for name, p in head.named_parameters() if p.requires_grad}
    _validate_whole(head, parameters)
    run = _Rerouted(head, forward, finish)
    tokens = ValidTokens.of(labels, ignore_index, hidden.device)
    settings: dict[str, Any] = {
        "names": tuple(parameters),
        "tokens": tokens,
        "rule": token_loss,
        "token_losses": token_losses,
    }
    compute = functools.partial(_sum_over_tiles, run=run, tile_size=tile_size, **settings)
    total = sum_with_gradient(compute, hidden.reshape(-1, hidden.shape[-1]), *parameters.values())
    return tokens.mean(total, num_items)


def is_linear(head: torch.nn.Module) -> bool:
    """Whether the class of `head` computes what `torch.nn.Linear` does, as those of FSDP2 and parametrizations do."""
    return type(head).forward is torch.nn.Linear.forward


def has_hooks(head: torch.nn.Module) -> bool:
    """Whether something runs around the forward of `head`, in either direction."""
    kinds = (head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)
    return any(len(hooks) for hooks in kinds)


class _Rerouted(torch.nn.Module):
    """A wrapper module, so that `functional_call` can pass the head parameters without running its hooks."""

    def __init__(self, head: torch.nn.Module, forward: Forward, finish: Forward | None) -> None:
        super().__init__()
        self.head = head
        # In a tuple, since a module that is an attribute would be registered a second time.
        self.steps = (forward,) if finish is None else (forward, finish)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            inputs = step(inputs)
        return inputs


def _validate_whole(head: torch.nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    sharded = [name for name, parameter in parameters.items() if isinstance(parameter, DTensor)]
    if sharded:
        raise ValueError(
            f"`{sharded[0]}` of `{type(head).__name__}` is sharded (`DTensor`), and every token needs all of it: call "
            "the loss inside the forward of the module that FSDP2 wraps, as `tile_loss` does."
        )


def _count_classes(run: _Rerouted, hidden: torch.Tensor) -> int:
    """The width of the logits: of one token, whatever its label."""
    with torch.no_grad():
        logits = run(hidden[:1])
    if logits.dim() != 2 or len(logits) != len(hidden[:1]):
        raise ValueError(
            f"`{type(run.head).__name__}` answers {tuple(hidden[:1].shape)} with {tuple(logits.shape)}, not with one "
            "vector of logits a token: a head must map (tokens, features) to (tokens, words)."
        )
    return logits.shape[1]


def _sum_over_tiles(tensors, needs, *, run: _Rerouted, names, tokens, rule: TokenLoss, tile_size, token_losses):
    """The sum of the tokens' losses, and the gradients that are needed."""
    hidden, *parameters = tensors
    wide = wide_dtype(hidden.dtype)
    if tile_size is None:
        tile_size = choose_tile_size(None, _count_classes(run, hidden)) if len(hidden) else MIN_TILE_TOKENS
    # Leaves of our own: a hook on a parameter then sees the whole gradient once, not a part of it with every tile.
    leaves = [p.detach().requires_grad_(need) for p, need in zip(parameters, needs[1:])]
    gradients = [torch.zeros_like(hidden) if needs[0] else None]
    gradients += [torch.zeros_like(p, dtype=wide_dtype(p.dtype)) if n else None for p, n in zip(leaves, needs[1:])]
    losses = hidden.new_empty(len(tokens), dtype=wide)
    for part, places, targets in tokens.tiles(tile_size):
        with torch.set_grad_enabled(any(needs)):
            inputs = hidden.index_select(0, places).detach().requires_grad_(needs[0])
            logits = torch.func.functional_call(run, dict(zip((f"head.{name}" for name in names), leaves)), (inputs,))
        slope = logits.detach().to(wide_dtype(logits.dtype), copy=True)
        losses[part] = rule.overwrite(slope, targets, any(needs))
        if logits.requires_grad:
            wanted = [x for x in (inputs, *leaves) if x.requires_grad]
            found = iter(torch.autograd.grad(logits, wanted, slope.to(logits.dtype), allow_unused=True))
            _add(gradients, [next(found) if x.requires_grad else None for x in (inputs, *leaves)], places)
    tokens.write(losses, token_losses)
    return losses.sum(), gradients


def _add(gradients: list, found: list, places: torch.Tensor) -> None:
    if found[0] is not None:
        gradients[0].index_copy_(0, places, found[0])
    for total, part in zip(gradients[1:], found[1:]):
        if part is not None:
            total.add_(part)

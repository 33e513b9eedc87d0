"""Cross entropy from hidden states and the output embedding, without the logits of a whole row.

What: logits in fp32 are the largest tensor of a long step (128K tokens of 128K words: 64 GiB, and a stock cross
entropy holds several of that size). Here they exist for one tile of tokens at a time.

How: for a tile, one matmul makes the logits, they are overwritten with softmax minus target, and two matmuls make the
gradients of the hidden states and of the weights at once, while the tile is there. The gradients wait for the
backward, which only scales them. So there are the three matmuls of a stock step and none is repeated. Ignored tokens
are never computed. Price: the gradients exist from the forward on, and there is one backward.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) works alike and is not called: it rounds the loss and, once a
chunk, the weight's gradient to half precision, computes ignored tokens, and ignores autocast. See
`docs/benchmarks/linear_cross_entropy_cpu.md`; `tests/unit/test_linear_cross_entropy.py` fails when that changes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..parallel.shard import IGNORE_INDEX
from .tiles import (
    TokenLoss,
    ValidTokens,
    choose_tile_size,
    sum_with_gradient,
    validate_hidden,
    validate_tile_size,
    wide_dtype,
    without_autocast,
)


def tiled_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    tile_size: int | None = None,
    num_items: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    token_losses: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of `hidden @ weight.T + bias` with `labels`, never holding more than one tile of logits.

    Args:
        hidden (`torch.Tensor` of shape `(..., D)`): what the head would be given.
        weight (`torch.Tensor` of shape `(V, D)`): the output embedding; it may be the input embedding too, or frozen.
        labels (`torch.Tensor` of shape `(...)`): the target of every token: already shifted.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): the head's.
        tile_size (`int`, *optional*): tokens whose logits exist at a time; defaults to about 2**26 logits, and at
            least 64 tokens.
        num_items (*optional*): what the sum is divided by; defaults to the valid tokens here.
        label_smoothing (`float`, *optional*, defaults to 0): the share of each target spread over all words.
        z_loss (`float`, *optional*, defaults to 0): weight of `logsumexp(logits) ** 2`, added to every token.
        scale (`float`, *optional*, defaults to 1): logits are multiplied by it (Cohere; Granite divides).
        softcap (`float`, *optional*): then `softcap * tanh(logits / softcap)`, after the scale (Gemma).
        ignore_index (`int`, *optional*, defaults to -100): tokens of this label are not computed.
        token_losses (`torch.Tensor` of shape `(...)`, *optional*): filled with the loss of every valid token.

    Returns:
        `torch.Tensor`: a scalar in fp32, or in fp64 if `hidden` is; 0 where no token is valid.

    Raises:
        ValueError: shapes, precisions or settings that do not fit together.

    Relations: `torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=...)` on the logits after
    scale and softcap; transformers' `LabelSmoother` computes the same formula, on logits it keeps in their precision
    and shifts itself. Under autocast the matmuls run in its precision, as a head's would.
    Normalization: by `num_items`.
    Gradient: made in this call, scaled in the backward; each tensor gets its own once. One backward only.
    Memory: one tile of logits in fp32 (another with a softcap, and one in half precision where that is multiplied),
    the gradient of `hidden`, and that of `weight` in fp32, to which all tiles add before it is rounded once.
    Communication: none.
    """
    validate_tile_size(tile_size)
    rule = TokenLoss(label_smoothing=label_smoothing, z_loss=z_loss, scale=scale, softcap=softcap)
    validate_hidden(hidden, labels)
    dtype = validate_head(hidden, weight, bias)
    tokens = ValidTokens.of(labels, ignore_index, hidden.device)
    settings: dict[str, Any] = {"tokens": tokens, "rule": rule, "dtype": dtype, "token_losses": token_losses}
    compute = functools.partial(_sum_over_tiles, tile_size=choose_tile_size(tile_size, len(weight)), **settings)
    total = sum_with_gradient(compute, hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    return tokens.mean(total, num_items)


def validate_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.dtype:
    """The precision of the matmuls; raises `ValueError` where a linear layer would fail, or see a part of itself."""
    if isinstance(weight, DTensor):
        raise ValueError(
            "`weight` is sharded (`DTensor`), and every token needs all of it: call the loss inside the forward of "
            "the module that FSDP2 wraps (as `tile_loss` does), or pass `weight.full_tensor()`."
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"`weight` has shape {tuple(weight.shape)}, but `hidden` of shape {tuple(hidden.shape)} needs (words, "
            f"{hidden.shape[-1]}): pass the output embedding as it stands in the head."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` has shape {tuple(bias.shape)}, but needs one entry a word, ({len(weight)},).")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"`hidden` is {hidden.dtype} and `weight` {weight.dtype}: convert one of them, or use `torch.autocast`."
        )
    return hidden.dtype


def _sum_over_tiles(tensors, needs, *, tokens: ValidTokens, rule: TokenLoss, dtype, tile_size: int, token_losses):
    """The sum of the tokens' losses, and the gradients that are needed."""
    hidden, weight, bias = tensors
    wide = wide_dtype(dtype)
    gradients = [torch.zeros_like(hidden) if needs[0] else None]
    gradients += [torch.zeros_like(x, dtype=wide) if need else None for x, need in zip(tensors[1:], needs[1:])]
    with without_autocast(hidden.device):
        head = weight.to(dtype)
        losses = hidden.new_empty(len(tokens), dtype=wide)
        for part, places, targets, inputs, logits in make_logits(hidden, head, bias, tokens, tile_size):
            losses[part] = rule.overwrite(logits, targets, any(needs))
            add_gradients(gradients, logits, inputs, head, places)
    tokens.write(losses, token_losses)
    return losses.sum(), gradients


def make_logits(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, tokens: ValidTokens, tile_size: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each tile: its range, indices and targets, the hidden states in the precision of `head`, and the logits.

    Memory: the logits of all tiles are one buffer in fp32 or fp64, free to be overwritten.
    """
    buffer = hidden.new_empty(min(tile_size, len(tokens)), len(head), dtype=wide_dtype(head.dtype))
    for part, places, targets in tokens.tiles(tile_size):
        inputs, logits = hidden.index_select(0, places).to(head.dtype), buffer[: len(places)]
        _multiply(inputs, head.t(), out=logits)
        if bias is not None:
            logits.add_(bias)
        yield part, places, targets, inputs, logits


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """`out = left @ right`; from half precision to fp32 without a rounding between, where the device can."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right))


def add_gradients(gradients, slope: torch.Tensor, inputs: torch.Tensor, head: torch.Tensor, places: torch.Tensor):
    """Add what one tile gives to the gradients of hidden states, weight and bias; `None` is skipped.

    Args:
        gradients: three tensors or `None`; those of weight and bias in fp32 or fp64.
        slope (`torch.Tensor` of shape `(n, V)`): the gradient of the tile's logits, in fp32 or fp64.
        inputs (`torch.Tensor` of shape `(n, D)`), head (`torch.Tensor` of shape `(V, D)`): as they were multiplied.
        places (`torch.Tensor` of shape `(n,)`): the rows of the hidden states.
    """
    for_hidden, for_weight, for_bias = gradients
    narrow = slope.to(inputs.dtype)
    if for_hidden is not None:
        for_hidden.index_copy_(0, places, torch.mm(narrow, head).to(for_hidden.dtype))
    if for_weight is not None and inputs.is_cuda and inputs.dtype != for_weight.dtype:
        torch.addmm(for_weight, narrow.t(), inputs, out_dtype=for_weight.dtype, out=for_weight)
    elif for_weight is not None:
        for_weight.addmm_(slope.t(), inputs.to(for_weight.dtype))
    if for_bias is not None:
        for_bias.add_(slope.sum(0))

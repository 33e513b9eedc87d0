"""ALiBi: scores get a slope times the distance between query and key, one slope a head, and nothing is rotated.

Two families of slopes exist, and two forms of the numbers. A model whose score gets `-slope * (i - j)` may as well get
`slope * j`, since what a query adds to all its scores is lost in the softmax. transformers computes the latter and
rounds it to the precision of the model: in bfloat16 it is off by more than the scores themselves after a few thousand
tokens. So here the distance is multiplied in float32, then rounded: near tokens, which weigh most, keep their digits.
Source: Press et al., arXiv 2108.12409.
"""

from __future__ import annotations

import math

import torch


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """The slopes of the paper, of BLOOM and of Falcon: powers of `2 ** (-8 / N)`.

    Beyond a power of two, every other slope of twice as many heads follows.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32.
    """
    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = torch.pow(torch.tensor(2 ** (-8 / closest)), torch.arange(1, 1 + closest))
    if closest == num_heads:
        return slopes
    more = torch.pow(torch.tensor(2 ** (-4 / closest)), torch.arange(1, 1 + 2 * (num_heads - closest), 2))
    return torch.cat([slopes, more])


def mpt_slopes(num_heads: int, bias_max: float = 8) -> torch.Tensor:
    """The slopes of MPT: from those of the next power of two, the odd ones first.

    Args:
        num_heads (`int`): `N`.
        bias_max (`float`, *optional*, defaults to 8): `attn_config.alibi_bias_max`.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32.
    """
    wide = 2 ** math.ceil(math.log2(num_heads))
    slopes = 1.0 / torch.pow(2, torch.arange(1, wide + 1).float() * (bias_max / wide))
    return slopes if wide == num_heads else torch.cat([slopes[1::2], slopes[::2]])[:num_heads]


def key_table(slopes: torch.Tensor, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """The numbers as transformers computes them, the `key_bias` of attention: slope times place, rounded.

    Args:
        slopes (`torch.Tensor` of shape `(N,)`): in the precision in which they are multiplied.
        num_tokens (`int`): of the longest row.
        dtype (`torch.dtype`): of the model.

    Returns:
        `torch.Tensor` of shape `(N, T)` in `dtype`.
    """
    return (slopes[:, None] * torch.arange(num_tokens, device=slopes.device)).to(dtype)

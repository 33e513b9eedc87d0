"""Buckets of tokens: random rotations, and the direction that a token is nearest to.

Rotations are drawn by a generator of their own for each seed, layer and head of the whole layer, so they are the same
on whichever rank a head is computed, and no random number of the run is taken. Each round draws after the one before:
the first rounds of eight are those of four.
Source: Andoni et al., arXiv 1509.02897; Kitaev et al., arXiv 2001.04451.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


# Products with directions that are computed at a time, if a head has fewer.
_PRODUCTS_AT_ONCE = 2**20
# Numbers of a layer's rotations that stay on its device.
_ROTATIONS_KEPT = 2**20


def draw_rotations(
    seed: int, layer: int, first_head: int, num_heads: int, head_size: int, num_hashes: int, num_buckets: int
) -> torch.Tensor:
    """The rotations of some heads of a layer.

    Args:
        seed, layer (`int`): `LSHConfig.hash_seed`, and which layer of the model it is.
        first_head, num_heads (`int`): which of all heads of the layer.
        head_size, num_hashes, num_buckets (`int`): sizes; one bucket needs no rotation.

    Returns:
        `torch.Tensor` of shape `(num_hashes, num_heads, head_size, num_buckets // 2)`, float64, on the CPU.
    """
    heads = [
        _rotations_of_head(seed, layer, head, head_size, num_hashes, num_buckets // 2)
        for head in range(first_head, first_head + num_heads)
    ]
    return torch.stack(heads, dim=1)


# A function of its arguments alone, which every layer asks for again in each forward.
@lru_cache(maxsize=512)
def _rotations_of_head(seed: int, layer: int, head: int, size: int, rounds: int, directions: int) -> torch.Tensor:
    bits = hashlib.blake2b(f"{seed}/{layer}/{head}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(bits, "little") >> 1)
    return torch.stack(
        [torch.randn(size, directions, generator=generator, dtype=torch.float64) for _ in range(rounds)]
    )


def rotations_for(
    query: torch.Tensor, seed: int, layer: int, first_head: int, num_hashes: int, num_buckets: int
) -> torch.Tensor:
    """[`draw_rotations`] for queries `(B, n, T, H)` on their device, where small ones stay.

    So no call waits for a device to take them. Beyond 4 MiB a layer they are copied again at each call.
    """
    heads, size = query.shape[1], query.shape[-1]
    sizes = seed, layer, first_head, heads, size, num_hashes, num_buckets
    wide = torch.promote_types(query.dtype, torch.float32)
    if heads * size * num_hashes * num_buckets // 2 > _ROTATIONS_KEPT:
        return draw_rotations(*sizes)
    return _rotations_on(query.device, wide, *sizes)


@lru_cache(maxsize=256)
def _rotations_on(device: torch.device, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    with torch.inference_mode(False):  # what is kept is used by any later call
        return draw_rotations(*sizes).to(device, dtype)


@torch.no_grad()
def hash_tokens(query: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """The bucket of every token in every round.

    Args:
        query (`torch.Tensor` of shape `(B, n, T, H)`): shared queries and keys.
        rotations (`torch.Tensor` of shape `(R, n, H, b / 2)`): see [`draw_rotations`]; with `b / 2 = 0`, one bucket.

    Returns:
        `torch.Tensor` of shape `(R, B, n, T)`: int16 where they fit, else int32.

    Memory: that, and `T x b / 2` products for a head, or a few where they are small.
    """
    rows, heads, tokens, _ = query.shape
    rounds, directions = len(rotations), rotations.shape[-1]
    kind = torch.int16 if 2 * directions < 2**15 else torch.int32
    buckets = torch.zeros(rounds, rows, heads, tokens, dtype=kind, device=query.device)
    if directions == 0 or tokens == 0:
        return buckets
    wide = torch.promote_types(query.dtype, torch.float32)
    rotations = rotations.to(query.device, wide)
    # One product for each row and head, so that a head's numbers do not depend on which others are there.
    count = max(1, _PRODUCTS_AT_ONCE // (tokens * directions))
    flat = buckets.view(rounds, rows * heads, tokens)
    for units in torch.arange(rows * heads, device=query.device).split(count):
        vectors = query[units // heads, units % heads].to(wide)
        for index in range(rounds):
            flat[index, units] = _nearest(torch.bmm(vectors, rotations[index, units % heads])).to(kind)
    return buckets


def _nearest(products: torch.Tensor) -> torch.Tensor:
    """Which direction, or which opposite one, has the largest product: the argmax of `[x, -x]`."""
    most, positive = products.max(-1)
    least, negative = products.min(-1)
    return torch.where(most >= -least, positive, negative + products.shape[-1])

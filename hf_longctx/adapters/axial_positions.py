"""Axial positions: a learned position for every token of a long row, from a few short tables.

What: position `p` of a grid `shape` has one index an axis (the last one moves fastest), and its vector is one entry of
every axis' table, one behind the other. A grid of 1,024 x 1,024 has positions for 1,048,576 tokens and 2,048 entries.
Any row up to the product works, and each token only needs its own position, so rows may be shared and packed.

How: [`AxialPositionEmbedding`] is a module of its own. [`use_axial_positions`] puts the same on a model with learned
positions, as GPT-2's: its table gets one row an entry, under the model's own name, and a patch reads it so.
Price: as a lookup; the positions are compared with the grid, which waits for a GPU once a forward.
Source: Reformer, https://huggingface.co/papers/2001.04451, in the code of its authors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention.implicit_positions import longest_document
from ..attention.unadapted import ON_AXIAL
from .instance_forward import PatchHandle, patch_on, put_on
from .no_rotation import own_config
from .pass_shard import ShardReader, pass_shard
from .wrapped import unwrap


_TABLE = "axial positions"
# What GPT-2 and its relatives call their table.
_NAME = "wpe"


class AxialPositionEmbedding(torch.nn.Module):
    """Positions of a grid, each the entries of its axes one behind the other.

    Args:
        shape (`Sequence[int]`): entries of each axis; their product is the longest row.
        dims (`Sequence[int]`): numbers of an entry of each axis; their sum is the width of a token.
        std (`float`, *optional*, defaults to 0.02): of the initial entries.

    Raises:
        ValueError: the two do not belong together, or a row is longer than the grid.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int], std: float = 0.02) -> None:
        super().__init__()
        self.shape, self.dims = _validate_grid(shape, dims)
        self.weights = torch.nn.ParameterList(torch.randn(n, d) * std for n, d in zip(self.shape, self.dims))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Vectors of the tokens at `position_ids`, of any shape; `(*position_ids.shape, sum(dims))`."""
        _validate_positions(position_ids, self.shape)
        indices = _indices(position_ids, self.shape)
        return torch.cat([torch.nn.functional.embedding(i, w) for i, w in zip(indices, self.weights)], dim=-1)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, dims={self.dims}"


class AxialHandle(PatchHandle):
    """What [`use_axial_positions`] returns: the modules that look up axial positions. It has no way back: the table
    was replaced."""

    def remove(self) -> None:
        """Raise `NotImplementedError`."""
        raise NotImplementedError(
            "axial positions replaced the table of the model, so they cannot be removed: build the model again."
        )


def use_axial_positions(
    model: torch.nn.Module, shape: Sequence[int], dims: Sequence[int] | None = None
) -> AxialHandle:
    """Give a model with learned positions axial ones instead, to be trained from scratch.

    Its table (`wpe`) is replaced by one of `sum(shape)` rows, whose part for an axis is as wide as its entries, and
    `config.max_position_embeddings` says so: transformers saves and loads it as it is. The grid is written into the
    configuration; after `from_pretrained`, `adapt`, the trainers or this put the lookup on again, and our attention
    refuses the model until then.

    Args:
        model (`torch.nn.Module`): of transformers, with a table `wpe` (GPT-2); changed in place.
        shape (`Sequence[int]`): entries of each axis; their product is the longest row.
        dims (`Sequence[int]`, *optional*): numbers of an entry of each axis. Unset: the width in equal parts.

    Returns:
        [`AxialHandle`]: a second call with the same grid changes nothing.

    Raises:
        ValueError: the grid does not fit the width; the model has another grid, or positions that were trained.
        NotImplementedError: it has no such table, or keeps tensors of its old length.
    """
    inner = unwrap(model)
    table = _find_table(inner)
    width = table.weight.shape[1]
    if dims is None:
        _validate_axes("shape", shape)
        if len(shape) > width:
            raise ValueError(f"`shape` {tuple(shape)} has more axes than a token has numbers ({width}): give fewer.")
        dims = [width // len(shape)] * (len(shape) - 1)
        dims = [*dims, width - sum(dims)]
    shape, dims = _validate_grid(shape, dims)
    if sum(dims) != width:
        raise ValueError(f"`dims` {dims} sum up to {sum(dims)}, but a token of `{type(inner).__name__}` has {width}.")
    grid, known = [list(shape), list(dims)], getattr(inner.config, ON_AXIAL, None)
    if known is None:
        _replace_table(inner, table, shape, dims)
        own_config(inner)
        inner.config.max_position_embeddings = sum(shape)
        setattr(inner.config, ON_AXIAL, grid)
    elif known != grid:
        raise ValueError(
            f"`{type(inner).__name__}` has axial positions of shape {tuple(known[0])} and dims {tuple(known[1])}, not "
            f"{shape} and {dims}: give the same ones, or build a new model."
        )
    put_on(table, _TablePatch(shape, dims))
    for module in inner.modules():  # attention looks for it
        vars(module)[ON_AXIAL] = True
    pass_shard(inner)
    return AxialHandle(model, _TABLE)


def follow_axial_positions(model: torch.nn.Module) -> None:
    """Put the lookup on a model again that was saved with axial positions; others are left alone."""
    inner = unwrap(model)
    grid = getattr(getattr(inner, "config", None), ON_AXIAL, None)
    if grid is not None and not any(patch_on(module, _TABLE) for module in inner.modules()):
        use_axial_positions(model, *grid)


class _TablePatch(ShardReader):
    """A table whose rows are the entries of all axes, one axis after the other."""

    name = _TABLE

    def __init__(self, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
        self.shape, self.dims = shape, dims

    def call(self, module: torch.nn.Module, own: Callable, position_ids: torch.Tensor, *args: Any, **kwargs: Any):
        shard = None if self.rows is None else self.rows.shard
        if shard is not None:  # on every rank of a row, where only some see its end
            _validate_length(longest_document(shard), self.shape)
        _validate_positions(position_ids, self.shape)
        parts, row, column = [], 0, 0
        for index, size, dim in zip(_indices(position_ids, self.shape), self.shape, self.dims):
            parts.append(own(index + row)[..., column : column + dim])
            row, column = row + size, column + dim
        return torch.cat(parts, dim=-1)


def _indices(positions: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    """The index of each position on every axis."""
    indices: list[torch.Tensor] = []
    for size in reversed(shape):
        indices.insert(0, positions % size)
        positions = positions // size
    return indices


def _validate_grid(shape: Sequence[int], dims: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    _validate_axes("shape", shape)
    _validate_axes("dims", dims)
    if len(shape) != len(dims):
        raise ValueError(
            f"`shape` {tuple(shape)} has {len(shape)} axes and `dims` {tuple(dims)} has {len(dims)}: give one each."
        )
    return tuple(shape), tuple(dims)


def _validate_axes(name: str, values: Sequence[int]) -> None:
    numbers = isinstance(values, Sequence) and not isinstance(values, str) and len(values)
    if not numbers or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise ValueError(f"`{name}` ({values!r}) must be positive integers, one an axis, such as (1024, 1024).")


def _validate_length(tokens: int, shape: tuple[int, ...]) -> None:
    if tokens > math.prod(shape):
        raise ValueError(
            f"a row has {tokens:,} positions, but the axial grid {shape} has {math.prod(shape):,}: shorten rows, or "
            "build the model with a larger `shape`."
        )


def _validate_positions(positions: torch.Tensor, shape: tuple[int, ...]) -> None:
    if not positions.numel():
        return
    least, most = torch.stack(positions.aminmax()).tolist()
    if least < 0:  # division would take it for an entry of the grid's end
        raise ValueError(f"`position_ids` hold {least}, and the positions of a grid begin at 0: count from there.")
    _validate_length(most + 1, shape)


def _find_table(model: torch.nn.Module) -> torch.nn.Embedding:
    name = type(model).__name__
    tables = [m for path, m in model.named_modules() if path.split(".")[-1] == _NAME]
    if not isinstance(model, PreTrainedModel) or len(tables) != 1 or not isinstance(tables[0], torch.nn.Embedding):
        raise NotImplementedError(
            f"`{name}` has no table of learned positions named `{_NAME}`, as GPT-2 has: build a GPT-2, or call an "
            "`AxialPositionEmbedding` in a model of your own."
        )
    length = tables[0].num_embeddings
    kept = [path for path, buffer in model.named_buffers() if length in buffer.shape]
    if kept:
        raise NotImplementedError(
            f"`{name}` keeps a tensor as long as its {length:,} positions (`{kept[0]}`), so rows of a larger grid "
            "would not fit: build a GPT-2, or call an `AxialPositionEmbedding` in a model of your own."
        )
    return tables[0]


def _replace_table(model: Any, table: torch.nn.Embedding, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    if getattr(table.weight, "_is_hf_initialized", False):
        raise ValueError(
            f"the positions of `{type(model).__name__}` were trained, and axial ones are other numbers: build a new "
            "model (`AutoModelForCausalLM.from_config(config)`) and train it from scratch."
        )
    weight = table.weight.new_zeros(sum(shape), table.weight.shape[1])
    row = column = 0
    for size, dim in zip(shape, dims):
        std = getattr(model.config, "initializer_range", 0.02)
        torch.nn.init.normal_(weight[row : row + size, column : column + dim], std=std)
        row, column = row + size, column + dim
    table.weight, table.num_embeddings = torch.nn.Parameter(weight), sum(shape)

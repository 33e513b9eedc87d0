"""Rotary embeddings whose frequencies depend on the length of the row take them from whole rows and single documents.

What: kinds such as `dynamic` and `longrope` read the length from the largest position of a call. On a rank that is its
share's, and in a packed row the longest document's.

How: patches `forward` of the rotary embedding and of the module that calls it. The latter sees the call's
`sequence_shard` and passes lengths down for the duration of the call. The embedding then runs its own forward with one
more position, the last of the row or document, and drops what comes out for it: no formula is written twice.
Documents of one length are rotated together, and each as if nothing had run before it.

Price: one call of the rotary embedding for every length of documents past its threshold; once a forward.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..attention.call_documents import TOKEN_NAMES, shard_of_forward
from ..attention.implicit_positions import LENGTHS_FOLLOWED, local_lengths, local_positions, packs_documents
from ..families import LENGTH_ROPE_KINDS, length_rope, rope_kind, rope_settings
from ..parallel.shard import SequenceShard
from .instance_forward import InstancePatch, named_arguments, patch_on, put_on


CALLER, ROTARY = "lengths of the rows", "lengths of the rotary embedding"
# Longer than any row, and exact in every precision that positions are multiplied in.
_FAR = 2**24


def patch_rotary(model: torch.nn.Module) -> None:
    """Patch every module of `model` that calls a rotary embedding whose frequencies depend on the length."""
    for caller in list(model.modules()):
        embeddings = [child for child in caller.children() if is_rotary(child) and depends_on_length(child)]
        for embedding in embeddings:
            put_on(embedding, _RotaryPatch())
        if embeddings:
            put_on(caller, _CallerPatch())


def is_rotary(module: torch.nn.Module) -> bool:
    """Whether a module makes rotations from positions."""
    names = inspect.signature(type(module).forward).parameters
    return "position_ids" in names and ("Rotary" in type(module).__name__ or hasattr(module, "rope_type"))


def depends_on_length(rotary: torch.nn.Module) -> bool:
    """Whether a rotary embedding gives the first positions other numbers next to a large one, tried on a copy.

    Args:
        rotary (`torch.nn.Module`): of any kind, with a forward of a tensor and `position_ids`.
    """
    if length_rope(getattr(rotary, "config", None)) is not None:
        return True
    near = torch.arange(4)[None]
    far = torch.cat([near, torch.tensor([[_FAR]])], dim=1)
    for kind in _layer_types(rotary):
        try:
            alone, beside = (_rotate_on_a_copy(rotary, positions, kind) for positions in (near, far))
        except Exception:  # it is none that transformers' models call with rows of positions
            continue
        if any(_differ_before(one, two, near.shape[-1]) for one, two in zip(alone, beside)):
            return True
    return False


def _differ_before(alone: torch.Tensor, beside: torch.Tensor, count: int) -> bool:
    """Whether the first `count` rotations changed; those of an image have no dimension of positions to compare."""
    if min(alone.dim(), beside.dim()) < 2 or alone.shape[-2] != count or beside.shape[-2] != count + 1:
        return False
    return not torch.equal(alone, beside.narrow(-2, 0, count))


def rotations(rotary: torch.nn.Module) -> list[tuple[torch.Tensor, ...]]:
    """What a rotary embedding makes of the first positions, for each kind of layer; empty tuples if it cannot."""
    found = []
    for kind in _layer_types(rotary):
        try:
            found.append(_rotate_on_a_copy(rotary, torch.arange(4)[None], kind))
        except Exception:  # it is none that transformers' models call with rows of positions
            found.append(())
    return found


@torch.no_grad()
def _rotate_on_a_copy(rotary: torch.nn.Module, positions: torch.Tensor, kind: str | None) -> tuple[torch.Tensor, ...]:
    rotary = copy.deepcopy(rotary)
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    x = torch.zeros(1, positions.shape[-1], 1, device=device)
    arguments = () if kind is None else (kind,)
    return _tensors(type(rotary).forward(rotary, x, positions.to(device), *arguments))


def _layer_types(rotary: torch.nn.Module) -> list:
    kinds = getattr(rotary, "rope_type", None)
    return list(kinds) if isinstance(kinds, dict) else [None]


@torch.no_grad()
def forget_lengths(model: torch.nn.Module) -> None:
    """Let rotary embeddings that remember the longest row so far be as they were before it."""
    for rotary in model.modules():
        if is_rotary(rotary) and length_rope(getattr(rotary, "config", None)) is not None:
            positions = next(rotary.buffers()).new_zeros(1, 1, dtype=torch.long)
            for kind in _layer_types(rotary):
                arguments = () if kind is None else (kind,)
                type(rotary).forward(rotary, positions[..., None].float(), positions, *arguments)


@contextlib.contextmanager
def lengths_forgotten(model: torch.nn.Module) -> Iterator[None]:
    """A block at whose beginning no row was seen, and after which rotary embeddings remember what they did before."""
    rotary = [module for module in model.modules() if is_rotary(module)]
    saved = [(dict(vars(module)), dict(module._buffers)) for module in rotary]
    values = [(buffer, buffer.clone()) for module in rotary for buffer in module.buffers()]
    forget_lengths(model)
    try:
        yield
    finally:
        for module, (attributes, buffers) in zip(rotary, saved):
            vars(module).update(attributes)
            module._buffers.update(buffers)
        for buffer, value in values:  # some are written in place
            buffer.copy_(value)


class _CallerPatch(InstancePatch):
    """Passes the lengths of a call's rows or documents to the rotary embeddings."""

    name = CALLER

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given = named_arguments(module, args, kwargs)
        shard = shard_of_forward(module, given)
        takes = inspect.signature(type(module).forward).parameters
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        if shard is None or not takes_more or (shard.size == 1 and not packs_documents(shard)):
            return own(*args, **kwargs)
        given[LENGTHS_FOLLOWED] = True
        if given.get("position_ids") is None and "position_ids" in takes:
            given["position_ids"] = _positions_of(shard, given)
        patches = [patch_on(child, ROTARY) for child in module.children()]
        patches = [patch for patch in patches if patch is not None]
        for patch in patches:
            patch.shard = shard
        try:
            return own(**given)
        finally:
            for patch in patches:
                patch.shard = None


def _positions_of(shard: SequenceShard, given: dict[str, Any]) -> torch.Tensor:
    """Positions from 0 in every document, for a batch that brought none."""
    tokens = next(given[name] for name in TOKEN_NAMES if given.get(name) is not None)
    positions = local_positions(shard)
    assert positions is not None, "the row of one document on one process is transformers' own"
    positions = positions.to(tokens.device)
    return positions if positions.dim() == 2 else positions[None]


class _RotaryPatch(InstancePatch):
    """Rotates by the length that the caller passes, for the duration of one call."""

    name = ROTARY

    def __init__(self) -> None:
        self.shard: SequenceShard | None = None

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        given = named_arguments(module, args, kwargs)
        shard, positions = self.shard, given.get("position_ids")
        if shard is None or positions is None:
            return own(*args, **kwargs)
        if positions.shape[-1] != shard.local_len:
            raise NotImplementedError(
                f"`{type(module).__name__}` rotates {positions.shape[-1]} positions, but this rank holds "
                f"{shard.local_len} tokens of a row, so no length can be told to it: load the model with rotary "
                "settings of the type 'default', 'linear', 'yarn' or 'llama3'."
            )
        rotate = lambda chosen: own(**{**given, "position_ids": chosen})
        lengths = local_lengths(shard)
        if lengths is None:
            length = shard.num_tokens if shard.num_positions is None else shard.num_positions
            return _rotate(rotate, positions, length)
        return _rotate_documents(module, rotate, given.get("layer_type"), positions, lengths.to(positions.device))


def _rotate(rotate: Callable, positions: torch.Tensor, length: int):
    """Rotations of some positions of a row that has `length` of them."""
    last = positions.new_full((*positions.shape[:-1], 1), length - 1)
    rotated = rotate(torch.cat([positions, last], dim=-1))
    kept = tuple(tensor.narrow(-2, 0, positions.shape[-1]) for tensor in _tensors(rotated))
    return kept if isinstance(rotated, tuple) else kept[0]


def _rotate_documents(
    module: torch.nn.Module, rotate: Callable, layer_type: str | None, positions: torch.Tensor, lengths: torch.Tensor
):
    """Rotations of documents, each as if it were alone; `lengths`: of every token's document, `(B, t)`."""
    positions = positions.expand(*positions.shape[:-2], *lengths.shape)
    lengths = _classes(module, layer_type, lengths.clamp(min=1))
    outputs: list[torch.Tensor] = []
    for length in lengths.unique().tolist():
        chosen = lengths == length
        some = positions[..., chosen].unsqueeze(-2)
        rotate(torch.zeros_like(some[..., :1]))  # frequencies that grew with an earlier call go back
        rotated = _rotate(rotate, some, length)
        parts = _tensors(rotated)
        if not outputs:
            outputs = [part.new_zeros(*part.shape[:-3], *lengths.shape, part.shape[-1]) for part in parts]
        for output, part in zip(outputs, parts):
            output[..., chosen, :] = part.squeeze(-3)
    return tuple(outputs) if isinstance(rotated, tuple) else outputs[0]


def _classes(module: torch.nn.Module, layer_type: str | None, lengths: torch.Tensor) -> torch.Tensor:
    """Lengths in which those that transformers' own kinds rotate alike are one."""
    settings = next(_settings_of(module, layer_type), {})
    kind, threshold = rope_kind(settings), settings.get("original_max_position_embeddings")
    if kind == "longrope" and isinstance(threshold, int):
        return torch.where(lengths > threshold, threshold + 1, threshold)
    threshold = getattr(module, "original_max_seq_len", None)
    if kind == "dynamic" and isinstance(threshold, int):
        return lengths.clamp(min=threshold)
    return lengths


def _settings_of(module: torch.nn.Module, layer_type: str | None) -> Iterator[dict]:
    settings = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if layer_type is not None and isinstance(settings.get(layer_type), dict):
        yield settings[layer_type]
    yield from (item for item in rope_settings(module.config) if rope_kind(item) in LENGTH_ROPE_KINDS)


def _tensors(rotated) -> tuple[torch.Tensor, ...]:
    """Cosines and sines, or complex numbers."""
    return rotated if isinstance(rotated, tuple) else (rotated,)

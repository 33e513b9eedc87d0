"""Let every layer of a model see the shard of a forward, also where the layers above it drop it.

What: some models keep what a batch brings from their attention layers or recurrent ones, and some causal language
models do not even pass it to their decoder. A patch that needs the rows of a forward is a [`ShardReader`]; while the
outermost model of transformers runs, each of them holds the [`ForwardRows`] of that forward.

How: patches `forward` of every model in the tree; the first one that is called reads its arguments. A layer that is
recomputed in backward gets the rows of the forward that it belongs to, since the functions that transformers and torch
put on a model to checkpoint its layers are wrapped for the time of the forward.

Price: one walk over the modules and some Python a forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention.cache_names import find_cache
from ..attention.call_documents import TOKEN_NAMES, document_facts, shard_of_forward, shard_of_rows
from ..attention.registry import find_attention
from ..parallel.shard import SequenceShard
from .instance_forward import InstancePatch, named_arguments, patches_on, put_on


CALLER = "rows of the forward"
# Attributes under which a model keeps the function that checkpoints its layers: transformers', and torch's wrapper's.
_CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


@dataclass(frozen=True, eq=False)
class ForwardRows:
    """What the outermost forward was given, as far as layers that mix tokens need it.

    Args:
        shard ([`SequenceShard`], *optional*): of the batch, or the documents of packed rows that no one has cut;
            `None` for whole rows of one document each.
        padding (`torch.Tensor` of shape `(B, t)`, *optional*): the `attention_mask` of these tokens, 0 for padding.
        positions (`torch.Tensor`, *optional*): the `position_ids` of these tokens.
        has_cache (`bool`): the caller passed a cache.
        attention (`str`, *optional*): the `attn_implementation` that the model runs.
        is_cut (`bool`): the shard came with the batch; otherwise documents were read from what the model got.
        config (`PretrainedConfig`, *optional*): of its text part.
        asks_for_cache (`bool`): the caller passed `use_cache=True`.
    """

    shard: SequenceShard | None
    padding: torch.Tensor | None
    positions: torch.Tensor | None
    has_cache: bool
    attention: str | None = None
    is_cut: bool = False
    config: Any = None
    asks_for_cache: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether other ranks hold tokens of these rows."""
        return self.shard is not None and self.shard.size > 1


class ShardReader(InstancePatch):
    """A patch that sees the rows of the forward that runs.

    Attributes:
        rows ([`ForwardRows`], *optional*): `None` outside of a forward of the model.
        tells_attention (`bool`): whether attention layers next to this one get the documents of a batch that no one
            has cut, as a keyword of the model: some models make their masks without the positions that tell them.
    """

    rows: ForwardRows | None = None
    tells_attention = False

    def rows_of_call(self, module: torch.nn.Module) -> ForwardRows:
        """The rows of the forward that runs.

        Raises:
            RuntimeError: the layer was called by itself, so nobody knows which rows it holds.
        """
        if self.rows is None:
            raise RuntimeError(
                f"`{type(module).__name__}` was called outside of a forward of its model, so it cannot know which "
                "rows its tokens belong to: call the model, enable activation checkpointing by "
                "`model.gradient_checkpointing_enable()`, or take the adapters off (`handle.remove()`)."
            )
        return self.rows


def pass_shard(model: torch.nn.Module) -> None:
    """Let the shard readers on the modules of `model` see the rows of every forward; put on after them.

    Args:
        model (`torch.nn.Module`): wrapped or not; patched in place, nothing if no module has a [`ShardReader`].
    """
    if shard_readers(model):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                put_on(module, _CallerPatch())


class _CallerPatch(InstancePatch):
    """Passes the arguments of the outermost forward to the shard readers below."""

    name = CALLER

    def call(self, module: torch.nn.Module, own: Callable, *args, **kwargs):
        readers = shard_readers(module)
        if not readers or any(reader.rows is not None for reader in readers):
            return own(*args, **kwargs)  # a model around this one has passed them
        rows = _read(module, named_arguments(module, args, kwargs))
        if rows.shard is not None and any(reader.tells_attention for reader in readers):
            kwargs["sequence_shard"] = rows.shard
        with rows_passed(readers, rows), _recomputed_with(module, readers, rows):
            return own(*args, **kwargs)


def shard_readers(model: torch.nn.Module) -> list[ShardReader]:
    return [patch for module in model.modules() for patch in patches_on(module) if isinstance(patch, ShardReader)]


def _read(module: torch.nn.Module, given: dict[str, Any]) -> ForwardRows:
    mask = given.get("attention_mask")
    padding = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    positions = given.get("position_ids")
    has_cache = find_cache(given) is not None
    config: Any = module.config
    text = config.get_text_config()
    attention = text._attn_implementation
    is_cut = given.get("sequence_shard") is not None
    if padding is not None and not is_cut and not has_cache:
        _validate_one_document(given, attention, padding)
    facts = padding, positions, has_cache, attention, is_cut, text, bool(given.get("use_cache"))
    return ForwardRows(shard_of_forward(module, given), *facts)


def _validate_one_document(given: dict[str, Any], attention: str | None, padding: torch.Tensor) -> None:
    """Raise `ValueError` for documents next to a mask, as attention does: a model may have no layer of it."""
    tokens = next((given[name] for name in TOKEN_NAMES if given.get(name) is not None), None)
    if tokens is None or find_attention(attention) is None:
        return
    rows, num_tokens = tokens.shape[:2]
    if facts := document_facts(given, num_tokens):
        shard_of_rows({**facts, "attention_mask": padding}, rows, num_tokens, tokens.device)


@contextlib.contextmanager
def rows_passed(readers: Sequence[ShardReader], rows: ForwardRows) -> Iterator[None]:
    before = [reader.rows for reader in readers]
    for reader in readers:
        reader.rows = rows
    try:
        yield
    finally:
        for reader, value in zip(readers, before):
            reader.rows = value


@contextlib.contextmanager
def _recomputed_with(model: torch.nn.Module, readers: Sequence[ShardReader], rows: ForwardRows) -> Iterator[None]:
    """A block in which layers that are checkpointed will be recomputed with these rows."""
    found = [
        (module, name, vars(module)[name])
        for module in model.modules()
        for name in _CHECKPOINT_FUNCTIONS
        if callable(vars(module).get(name))
    ]
    for module, name, checkpoint in found:
        vars(module)[name] = functools.partial(_checkpoint, checkpoint, readers, rows)
    try:
        yield
    finally:
        for module, name, checkpoint in found:
            vars(module)[name] = checkpoint


def _checkpoint(checkpoint: Callable, readers: Sequence[ShardReader], rows: ForwardRows, function, *args, **kwargs):
    def run(*inputs, **named):
        with rows_passed(readers, rows):
            return function(*inputs, **named)

    return checkpoint(run, *args, **kwargs)

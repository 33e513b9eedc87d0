"""The attention names: one entry each, and the only file that touches transformers' attention registries.

Everything that depends on which attention a model runs reads its entry. A name is always registered with its mask
function: a name without one gets no mask at all, and padding is silently ignored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..class_tables import add_to_class_tables, remove_from_class_tables
from .call import AttentionCall
from .distance_bias import ALIBI
from .unadapted import refuse_lost_alibi, refuse_lost_patches


# Transformers branches on these parts of a name; with a slash it looks for a kernel on the Hub.
_RESERVED_PARTS = ("flash", "sdpa", "flex_attention", "paged|", "/")


@dataclass(frozen=True)
class AttentionEntry:
    """One attention name.

    Args:
        name (`str`): of `attn_implementation`.
        function (`Callable`): transformers' signature, `(module, query, key, value, attention_mask, ...)`, plus the
            keyword `sequence_shard`; see [`attend_sharded`][hf_longctx.attention.ulysses.attend_sharded] for its body.
        mask_function (`Callable`): what transformers builds the mask with; `deferred_mask` for any function that calls
            `attend_sharded`.
        shards_rows (`bool`): it attends over rows whose tokens live on several ranks.
        packs_rows (`bool`): it keeps the documents of a row apart.
        per_head (`tuple` of `str`): keyword arguments of the call that have the query heads as their first dimension.
            They are cut with the heads.
        takes (`tuple` of `str`): which of `"dropout"` and `"softcap"` it computes. A call with another is refused.

    Raises:
        ValueError: no mask function, or a name that transformers would take for a kernel of its own.
    """

    name: str
    function: Callable
    mask_function: Callable | None = None
    shards_rows: bool = False
    packs_rows: bool = False
    per_head: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mask_function is None:
            raise ValueError(
                f"`mask_function` of the attention {self.name!r} is missing, so transformers would pass it no mask "
                "and padding would be lost: set it to `hf_longctx.attention.deferred_mask`."
            )
        for part in _RESERVED_PARTS:
            if part in self.name:
                raise ValueError(
                    f"`name` ({self.name!r}) contains {part!r}, by which transformers takes it for a kernel of its "
                    "own: choose a name without it."
                )

    def call(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: object,
    ) -> AttentionCall:
        """The arguments of an attention function, without `sequence_shard`, as an [`AttentionCall`]."""
        refuse_lost_alibi(module, kwargs.get(ALIBI))
        refuse_lost_patches(module)
        per_head = {name: kwargs[name] for name in self.per_head if name in kwargs}
        extras = {name: value for name, value in kwargs.items() if name not in per_head}
        return AttentionCall(
            self, module, query, key, value, attention_mask, dropout, scaling, is_causal, per_head, extras
        )


_ENTRIES: dict[str, AttentionEntry] = {}


def register_attention(entry: AttentionEntry) -> None:
    """Add an attention name: transformers loads models on it, and trainers and checks read its entry.

    Args:
        entry ([`AttentionEntry`]): registering the same entry again changes nothing.

    Raises:
        ValueError: the name is taken.
    """
    if _ENTRIES.get(entry.name) == entry:
        return
    taken = {"eager", *ALL_ATTENTION_FUNCTIONS, *ALL_MASK_ATTENTION_FUNCTIONS, *_ENTRIES}
    if entry.name in taken:
        raise ValueError(
            f"`name` ({entry.name!r}) is an attention name already: choose one that is not among "
            f"{', '.join(sorted(taken))}."
        )
    add_entry(entry)


def add_entry(entry: AttentionEntry) -> None:
    """Put an entry into the table and into transformers' registries, whatever they hold under its name."""
    _ENTRIES[entry.name] = entry
    AttentionInterface.register(entry.name, entry.function)
    AttentionMaskInterface.register(entry.name, entry.mask_function)
    add_to_class_tables(entry.name)


@contextlib.contextmanager
def known_to_transformers(entry: AttentionEntry) -> Iterator[None]:
    """Let transformers build and run models on `entry` inside the block only. The table never holds it.

    For an attention that no model may train on, such as that of a simulation.
    """
    registries = (AttentionInterface, entry.function), (AttentionMaskInterface, entry.mask_function)
    before = [registry._global_mapping.get(entry.name) for registry, _ in registries]
    for registry, function in registries:
        registry.register(entry.name, function)
    add_to_class_tables(entry.name)
    try:
        yield
    finally:
        if entry.name not in _ENTRIES:
            remove_from_class_tables(entry.name)
        for (registry, _), function in zip(registries, before):
            if function is None:
                registry._global_mapping.pop(entry.name, None)
            else:
                registry.register(entry.name, function)


def find_attention(name: str | None) -> AttentionEntry | None:
    """The entry of `attn_implementation`, or `None` for an attention that is not of this package."""
    return None if name is None else _ENTRIES.get(name)


def shards_rows(name: str | None) -> bool:
    """Whether `attn_implementation` attends over rows whose tokens live on several ranks."""
    entry = find_attention(name)
    return entry is not None and entry.shards_rows


def packs_rows(name: str | None) -> bool:
    """Whether `attn_implementation` is one of this package that keeps the documents of a row apart."""
    entry = find_attention(name)
    return entry is not None and entry.packs_rows


def name_that_shards() -> str:
    """The name to recommend for rows that several ranks share."""
    return next(entry.name for entry in _ENTRIES.values() if entry.shards_rows)


def name_that_packs() -> str:
    """The name to recommend for packed rows on one process."""
    return next(entry.name for entry in _ENTRIES.values() if entry.packs_rows and not entry.shards_rows)

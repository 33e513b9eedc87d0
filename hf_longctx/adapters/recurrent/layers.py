"""Recurrent layers of transformers' models, each as its own code on a rank's tokens of whole rows.

What: [`follow_recurrences`] finds the layers whose `forward` calls a function of [`RULES`], and patches each instance.
The patched forward is transformers' code in which that function knows of ranks and documents.

A new kind of recurrence is a function in a file of this package and one row in `RULES`: by the name that transformers
gives the function, `rule(original, pieces, *args, **kwargs)`, with transformers' arguments and results.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...attention.cache_names import CACHE_NAMES
from ...attention.unadapted import layers_with_state
from ...parallel.segments import DOCUMENT_BOUND_KEYS
from ..instance_forward import PatchHandle, put_on
from ..pass_shard import ForwardRows
from ..rebind import RebindPatch, called_names
from ..sparse.block_indexer import picks_blocks
from ..sparse.compressed_layers import is_compressed_layer
from ..sparse.compressors import compresses
from ..sparse.pooled_indexer import picks_pools
from ..sparse.shared_row import is_sparse_layer, picks_tokens
from .convolution import convolve
from .delta_rule import delta_rule
from .lightning import LightningPatch
from .mamba1 import selective_scan
from .mamba2 import chunk_scan
from .pieces import SharePieces
from .reader import RECURRENT, RecurrentReader
from .rg_lru import follow_block
from .scan import no_fused_kernel
from .window import reach_of, run_window


RULES: dict[str, Callable] = {
    "causal_conv1d_fn": convolve,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": chunk_scan,
    "mamba2_split_conv1d_scan_combined": no_fused_kernel,
    "mamba_inner_fn": no_fused_kernel,
    "mamba_selective_scan": selective_scan,
    "torch_chunk_gated_delta_rule": delta_rule,
}

# Inputs of one entry a token of layers that look at the tokens before in their own code.
_TOKEN_INPUTS = ("hidden_states", "dynamic_input", "conv_mask")

# Functions that do all of a layer at once, and the one that a layer must be able to call instead.
_FUSED = {"mamba2_split_conv1d_scan_combined": "mamba2_chunk_scan", "mamba_inner_fn": "mamba_selective_scan"}

# By the name of their class, layers that call no such function: what patches one.
LAYERS: dict[str, Callable[[torch.nn.Module], None]] = {
    "MiniMaxLightningAttention": lambda module: put_on(module, LightningPatch()),
    "RecurrentGemmaRecurrentBlock": follow_block,
}

# ... and layers whose recurrence is a loop of their own over tokens, for which there is no adapter.
LOOPS = ("RwkvSelfAttention", "xLSTMBlock")


def follow_recurrences(model: torch.nn.Module) -> PatchHandle:
    """Patch the recurrent layers of one model, whose states then run over whole rows and end with each document.

    Args:
        model (`torch.nn.Module`): any; a model without such layers is left alone.

    Returns:
        [`PatchHandle`]: `remove()` takes the patches off. Patching twice is patching once.

    Raises:
        NotImplementedError: a layer does all of its recurrence in one function.
    """
    for module in list(model.modules()):
        rules = rules_of(module)
        if rules or reach_of(module) is not None:
            _refuse_fused(module, rules)
            put_on(module, RecurrentPatch())
        elif (patch := _of_class(module, LAYERS)) is not None:
            patch(module)
    return PatchHandle(model, RECURRENT)


def rules_of(module: torch.nn.Module) -> dict[str, Callable]:
    """The rules by the name of the function that the layer's class calls; empty for every other module."""
    names = called_names(type(module).forward) if hasattr(type(module), "forward") else set()
    return {name: rule for name, rule in RULES.items() if name in names}


def unfollowed_layers(model: torch.nn.Module) -> list[str]:
    """Kinds of layers with a state along the sequence, as in `config.layer_types`, for which there is no adapter.

    Returns:
        their names, each with the classes that have none; empty if all layers can be followed. That they are exact is
        for the sanity check to find, which runs the model.
    """
    if any(kind.__name__ in LOOPS for module in model.modules() for kind in type(module).__mro__):
        return [model.config.model_type]
    kinds = layers_with_state(model.config)
    types = model.config.get_text_config().layer_types if kinds else []
    # A tower for images may have as many layers as the text's stack, and none that can be followed.
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    stacks = [module for module in lists if len(module) == len(types)]
    known = (stack for stack in stacks if any(is_followed(module) for module in stack.modules()))
    stack = next(known, stacks[0] if stacks else ())
    found: dict[str, set[str]] = {}
    for kind, layer in zip(types, stack):
        missing = {type(module).__name__ for module in _stateful(layer) if not is_followed(module)}
        if kind in kinds and (missing or not any(is_followed(module) for module in layer.modules())):
            found.setdefault(kind, set()).update(missing or {type(layer).__name__})
    if not len(stack) and sum(is_followed(module) for module in model.modules()) < sum(
        kind in kinds for kind in types
    ):
        found = {kind: set() for kind in kinds}
    named = {kind: ", ".join(f"`{name}`" for name in sorted(found[kind])) for kind in sorted(found)}
    return [f"{kind} ({classes})" if classes else kind for kind, classes in named.items()]


def _stateful(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """The innermost modules of a layer that take a cache, without those that call transformers' attention."""
    takes = [module for module in layer.modules() if module is not layer and _takes_cache(module)]
    innermost = [module for module in takes if not any(_takes_cache(inner) for inner in list(module.modules())[1:])]
    return [module for module in innermost if "ALL_ATTENTION_FUNCTIONS" not in called_names(type(module).forward)]


def _takes_cache(module: torch.nn.Module) -> bool:
    return bool(set(CACHE_NAMES) & set(inspect.signature(type(module).forward).parameters))


def is_followed(module: torch.nn.Module) -> bool:
    """Whether there is an adapter for this layer."""
    is_sparse = any(
        has(module)
        for has in (is_sparse_layer, picks_tokens, picks_blocks, picks_pools, is_compressed_layer, compresses)
    )
    return is_sparse or bool(rules_of(module)) or reach_of(module) is not None or _of_class(module, LAYERS) is not None


def _of_class(module: torch.nn.Module, table: Mapping[str, Any]) -> Any:
    """The entry of the module's class; FSDP2 gives it one of its own, below transformers'."""
    return next((table[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in table), None)


class RecurrentPatch(RecurrentReader, RebindPatch):
    """The layer's own forward, whose functions know of ranks and documents."""

    def follow(
        self, module: torch.nn.Module, own: Callable, pieces: SharePieces, rows: ForwardRows, given: dict[str, Any]
    ) -> Any:
        reach = reach_of(module)
        if reach is not None:
            return _run_window(own, pieces, reach, given)
        forward = type(module).forward
        rules = {
            name: functools.partial(rule, called_function(forward, name), pieces)
            for name, rule in rules_of(module).items()
        }
        return self.run(module, own, rules, (), given)


def _run_window(own: Callable, pieces: SharePieces, reach: int, given: dict[str, Any]) -> Any:
    tokens = {name: given.pop(name) for name in _TOKEN_INPUTS if name in given}
    given = {name: value for name, value in given.items() if name not in DOCUMENT_BOUND_KEYS}  # `pieces` has read them
    return run_window(functools.partial(own, **given), pieces, reach, tokens, "conv_mask")


def called_function(forward: Any, name: str) -> Callable:
    """What a global name means in the code of `forward`."""
    inner: Any = inspect.unwrap(forward)
    return inner.__globals__[name]


def _refuse_fused(module: torch.nn.Module, rules: dict[str, Callable]) -> None:
    """Raise `NotImplementedError` for a layer that has no other way than a fused kernel, which knows of no ranks."""
    for name, parts in _FUSED.items():
        if name in rules and parts not in rules:
            raise NotImplementedError(
                f"`{type(module).__name__}` runs its recurrence in `{name}` only, a fused kernel that keeps its state "
                "to itself: set `sequence_parallel_size` to 1 and do not pack, or install a version of transformers "
                f"whose layer also calls `{parts}`."
            )

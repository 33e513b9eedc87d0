"""One pass of a model's layers over one window, and `N` of them: what sleep is made of.

The model's own forward runs: its masks, rotations and layers. The first pass gets tokens, each later one the hidden
states that the pass before left in front of the final norm, as inputs. All passes start with the keys that were there
when the window began and with its left context of short convolutions; only recurrent states go from pass to pass. (The
context at the end of a pass would wrap the window onto itself: its first tokens would be convolved with its last.)

Price: a window of `N` passes costs `N` forwards of it, and holds the activations of all of them unless the model's
gradient checkpointing is on: each pass is then recomputed in backward, as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..adapters.instance_forward import InstancePatch, put_on, take_off
from ..config.sleep import SleepConfig
from .cache import SleepCache


@dataclass(frozen=True)
class Sleeper:
    """The parts of a model that a pass runs.

    Args:
        model (`torch.nn.Module`): the causal language model itself, unwrapped.
        forward (`Callable`): its forward, below the patch that calls this.
        backbone (`torch.nn.Module`): the model without its head.
        layers (`torch.nn.ModuleList`): its stack.
        norm (`torch.nn.Module`): the norm behind it.
        cache_names (`tuple[str, str]`): what the cache is called, in the model's and in the backbone's arguments.
    """

    model: torch.nn.Module
    forward: Callable
    backbone: torch.nn.Module
    layers: torch.nn.ModuleList
    norm: torch.nn.Module
    cache_names: tuple[str, str]


@dataclass(frozen=True)
class Window:
    """One window of some rows.

    Args:
        tokens (`torch.Tensor` of shape `(B, L)`): its ids.
        start (`int`): position of the first in its row.
        arguments (`dict`): what else the model's layers get.
    """

    tokens: torch.Tensor
    start: int
    arguments: dict[str, Any]


class _Skip(InstancePatch):
    """A layer that is not in the loop hands on what it gets."""

    name = "sleep_skip"

    def call(self, module, own, *args, **kwargs):
        return args[0] if args else kwargs["hidden_states"]


def read_window(
    sleeper: Sleeper, cache: SleepCache, window: Window, config: SleepConfig, num_logits: int | None = 0
) -> tuple[torch.Tensor | None, SleepCache]:
    """A single pass: a window that is awake.

    Args:
        num_logits (`int`, *optional*, defaults to 0): of the last tokens; 0: no logits, `None`: of all tokens.

    Returns:
        `tuple[torch.Tensor | None, SleepCache]`: logits, and the cache behind the window, with all its keys.
    """
    whole = (0, len(sleeper.layers))
    _, logits, cache = _run(sleeper, partial(_pass, sleeper, cache, window, None, whole, config, num_logits))
    return logits, cache


def sleep_window(
    sleeper: Sleeper, cache: SleepCache, window: Window, config: SleepConfig, num_logits: int = 0
) -> tuple[torch.Tensor | None, SleepCache]:
    """`config.passes` passes over one window; see [`read_window`] for arguments and results."""
    first, last = config.loop_layers or (0, len(sleeper.layers))
    hidden, logits, before, early = None, None, cache, None
    for number in range(config.passes):
        is_first, is_last = number == 0, number == config.passes - 1
        if not is_first:
            now = cache.copied()
            now.take_keys(before)
            now.take_convolutions(before)
            cache = now
        layers = (0 if is_first else first, len(sleeper.layers) if is_last else last)
        wanted = num_logits if is_last else 0
        hidden, logits, cache = _run(sleeper, partial(_pass, sleeper, cache, window, hidden, layers, config, wanted))
        early = cache if is_first else early
    if early is not None and first > 0 and config.eviction == "sliding":
        # What ran in the first pass only left its keys there.
        cache = cache.copied()
        cache.take_keys(early, range(first))
    return logits, cache


def forget(cache: SleepCache, config: SleepConfig) -> SleepCache:
    """What is left of a cache behind a full window."""
    cache = cache.copied()
    if config.eviction == "hard":
        cache.drop_keys()
    else:
        assert config.window is not None
        cache.keep_keys(config.window - 1)
    return cache


def _run(sleeper: Sleeper, run: Callable) -> Any:
    """As the model's gradient checkpointing says: now, or once more in backward."""
    model = sleeper.model
    if model.training and torch.is_grad_enabled() and _checkpointed(model):
        return checkpoint(run, use_reentrant=False)
    return run()


def _pass(
    sleeper: Sleeper,
    cache: SleepCache,
    window: Window,
    hidden: torch.Tensor | None,
    layers: tuple[int, int],
    config: SleepConfig,
    num_logits: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None, SleepCache]:
    """One pass of some layers: hidden states in front of the final norm, logits, and the cache behind it."""
    num_tokens = window.tokens.shape[1]
    cache = cache.copied(own_states=num_tokens == 1)
    cache.runs_all_layers = layers == (0, len(sleeper.layers))
    positions = torch.arange(window.start, window.start + num_tokens, device=window.tokens.device)[None]
    inputs = {"input_ids": window.tokens} if hidden is None else {"inputs_embeds": hidden.detach()}
    inputs |= {"position_ids": positions, "use_cache": True, **window.arguments}
    mask = _sliding_mask(cache, num_tokens, config, window.tokens.device)
    if mask is not None:
        inputs["attention_mask"] = mask.expand(window.tokens.shape[0], 1, -1, -1)
    found: list[torch.Tensor] = []
    handle = sleeper.norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        with plain_layers(sleeper.model), _only(sleeper.layers, *layers), _entered(sleeper.layers[0], hidden):
            if num_logits == 0:
                sleeper.backbone(**inputs, **{sleeper.cache_names[1]: cache})
                logits = None
            else:
                kept = {} if num_logits is None else {"logits_to_keep": num_logits}
                logits = sleeper.forward(**inputs, **kept, **{sleeper.cache_names[0]: cache}).logits
    finally:
        handle.remove()
    return found[-1], logits, cache


def _sliding_mask(
    cache: SleepCache, num_tokens: int, config: SleepConfig, device: torch.device
) -> torch.Tensor | None:
    """Who sees whom where keys of the last window are there still: the `window` last tokens, oneself among them."""
    kept = cache.get_seq_length()
    if config.eviction == "hard" or kept == 0:
        return None
    assert config.window is not None
    ago = torch.arange(kept, kept + num_tokens, device=device)[:, None] - torch.arange(
        kept + num_tokens, device=device
    )
    return ((ago >= 0) & (ago < config.window))[None, None]


@contextlib.contextmanager
def _entered(layer: torch.nn.Module, hidden: torch.Tensor | None) -> Iterator[None]:
    """The stack begins with these hidden states: what a model does to embeddings is not done to them once more."""

    def enter(module, args, kwargs):
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    # In front of hooks that look at what a layer gets.
    handle = None if hidden is None else layer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextlib.contextmanager
def _only(layers: torch.nn.ModuleList, first: int, last: int) -> Iterator[None]:
    skipped = [layer for index, layer in enumerate(layers) if not first <= index < last]
    for layer in skipped:
        put_on(layer, _Skip())
    try:
        yield
    finally:
        for layer in skipped:
            take_off(layer, _Skip.name)


@contextlib.contextmanager
def plain_layers(model: torch.nn.Module) -> Iterator[None]:
    """Layers that checkpoint themselves drop the cache; here whole passes are recomputed."""
    checkpointed = _checkpointed(model)
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


def _checkpointed(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if vars(module).get("gradient_checkpointing", False)]

"""`generate()` of a TTT model: it learns while the prompt is read, and while tokens are written."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import GenerationMixin

from ..attention.cache_names import CACHE_NAMES, OUTPUT_NAME
from .fast_cache import TTTCache
from .forward_checks import find_one_cache, validate_continuation, validate_learn
from .prompt_checks import Options, leave_written, validate_options, validate_prompts, validate_sharing
from .reading import validate_reading


class GeneratingMixin:
    """In front of `GenerationMixin`: a cache of fast weights, and what cannot be exact with it."""

    settings: Any  # these of the model
    generation_config: Any
    make_cache: Any
    cache_facts: Any
    weight_facts: Any
    device: torch.device

    def generate(
        self, inputs: torch.Tensor | None = None, *args: Any, learn: bool | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate()`, which also learns.

        Args:
            inputs (`torch.Tensor` of shape `(B, t)`): the prompt; with a cache, what comes after what it has read and
                what an earlier `generate()` wrote into it.
            learn (`bool`, *optional*): whether steps are taken. Unset: while the prompt is read, and while tokens are
                written if `learn_while_generating`.
            args, kwargs: transformers'; `cache` ([`TTTCache`]) goes on from there, and is changed. What was written
                counts as read in the next call: the last token is `cache.unread` until then. After beams, or a batch
                in which a row ended before others, the cache refuses further use.

        Raises:
            NotImplementedError: prompts of unequal length, assisted decoding, guidance or another kind of cache.
            RuntimeError: a cache that cannot go on.
            ValueError: shapes, or a cache of another model.
        """
        options = Options({**_named(args), **kwargs}, self.generation_config)
        validate_options(options)
        prompts = inputs if inputs is not None else options.get("input_ids")
        validate_prompts(options, prompts)
        learns = validate_learn(learn, unset=True)
        if learns and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "`generate()` takes gradient steps, and `torch.inference_mode()` forbids gradients for good: use "
                "`torch.no_grad()`, or pass `learn=False`."
            )
        cache = find_one_cache(kwargs)
        for name in CACHE_NAMES:
            kwargs.pop(name, None)
        library: Any = super()
        if prompts is not None:
            mask, positions = (options.get(name) for name in ("attention_mask", "position_ids"))
            validate_continuation(prompts, mask, positions, 0 if cache is None else cache.known)
        if cache is None and options.get("use_cache") is False:
            self._validate_rereading(learn)
            return library.generate(inputs, *args, learn=learn, **kwargs)
        cache = self.make_cache() if cache is None else cache
        checked = self.weight_facts(fresh=True)
        cache.validate_facts(self.cache_facts(checked=checked))
        validate_sharing(cache, prompts, options)
        if prompts is not None:
            validate_reading(cache, prompts.repeat_interleave(options.times, 0), learns)
        cache.checked = checked
        try:
            return self._write(cache, inputs, args, options, learn, kwargs)
        finally:
            cache.checked = None

    def _write(self, cache: TTTCache, inputs: Any, args: tuple, options: Options, learn: bool | None, given: dict):
        library: Any = super()
        was_frozen, known = cache.is_frozen, cache.known
        with cache.changing("`generate()`"):
            result = library.generate(
                inputs, *args, learn=learn, **{**given, OUTPUT_NAME: cache, "read_before": known}
            )
        if learn is None and cache.is_frozen and not was_frozen:
            cache.frozen_by = "learn_while_generating=False"
        rows = result if isinstance(result, torch.Tensor) else result.sequences
        prompts = inputs if inputs is not None else options.get("input_ids")
        leave_written(cache, rows, known, 1 if prompts is None else prompts.shape[1], options)
        return result

    def _validate_rereading(self, learn: bool | None) -> None:
        if learn is None and not self.settings.learn_while_generating:
            raise ValueError(
                "`use_cache` (False) reads the whole row again for every token, and `learn_while_generating` (False) "
                "learns from its prompt only: generate with a cache, or pass `learn` as True or False."
            )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, read_before: int = 0, learn: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The tokens that the cache has not read yet; transformers calls it before every forward."""
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if learn is None:
            learn = bool(kwargs.get("is_first_iteration", False)) or self.settings.learn_while_generating
        # `generate()` has seen that the mask has no padding and that positions count up.
        inputs = {"learn": learn, "logits_to_keep": kwargs.get("logits_to_keep", 0)}
        if cache is None:
            return {"input_ids": input_ids.to(self.device), **inputs}
        # What the cache has not read of an earlier `generate()` it reads by itself, before the prompt.
        begin = max(cache.seen - read_before, 0)
        return {"input_ids": input_ids[:, begin:].to(self.device), OUTPUT_NAME: cache, **inputs}

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not for models with fast weights."""
        raise NotImplementedError(
            "continuous batching keeps pages of keys and values, with no place for fast weights: call `generate()` "
            "once for each length of prompts."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _named(args: tuple) -> dict[str, Any]:
    """Arguments of transformers' `generate()` after `inputs`, by name."""
    names = list(inspect.signature(GenerationMixin.generate).parameters)[2:]
    return dict(zip(names, args))

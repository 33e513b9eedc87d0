"""`generate()` of a TTT model: it learns while the prompt is read, and while tokens are written."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.cache_names import CACHE_NAMES, OUTPUT_NAME
from .fast_cache import TTTCache
from .forward_checks import validate_mask, validate_prompts


class GeneratingMixin:
    """In front of `GenerationMixin`: a cache of fast weights, and what cannot be exact with it."""

    settings: Any  # these of the model
    make_cache: Any
    cache_facts: Any

    def generate(
        self, inputs: torch.Tensor | None = None, *args: Any, learn: bool | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate()`, which also learns.

        Args:
            inputs (`torch.Tensor` of shape `(B, t)`): the prompt; with a cache, what comes after what it has read.
            learn (`bool`, *optional*): whether steps are taken. Unset: while the prompt is read, and while tokens are
                written if `learn_while_generating`.
            args, kwargs: transformers'; `cache` ([`TTTCache`]) goes on from there, and is changed.

        Raises:
            NotImplementedError: prompts of unequal length, assisted decoding or another kind of cache.
        """
        given = kwargs.get("generation_config")
        for name in ("assistant_model", "prompt_lookup_num_tokens", "cache_implementation", "prefill_chunk_size"):
            value = kwargs.get(name, getattr(given, name, None))
            if value is not None and name == "prefill_chunk_size":
                raise NotImplementedError(
                    f"`prefill_chunk_size` ({value!r}) cuts prompts, and a TTT model reads them in chunks of its own "
                    "anyway: leave it out."
                )
            if value is not None and name == "cache_implementation":
                raise NotImplementedError(
                    f"`cache_implementation` ({value!r}) has no place for fast weights: leave it out; a `TTTCache` "
                    "has one size anyway."
                )
            if value is not None:
                raise NotImplementedError(
                    f"assisted decoding (`{name}`) takes back tokens, and a step that learned from them cannot be "
                    "taken back: leave it out."
                )
        prompts = inputs if inputs is not None else kwargs.get("input_ids")
        validate_mask(kwargs.get("attention_mask"))
        validate_prompts(kwargs.get("attention_mask"))
        if learn is not False and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "`generate()` takes gradient steps, and `torch.inference_mode()` forbids gradients for good: use "
                "`torch.no_grad()`, or pass `learn=False`."
            )
        cache = next((kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is None and kwargs.get("use_cache", getattr(given, "use_cache", True)) is not False:
            cache = self.make_cache()
        if cache is not None:
            self._validate_sharing(cache, prompts, given, kwargs)
            kwargs |= {OUTPUT_NAME: cache, "read_before": cache.seen}
        library: Any = super()
        return library.generate(inputs, *args, learn=learn, **kwargs)

    def _validate_sharing(self, cache: Any, prompts: Any, given: Any, kwargs: dict[str, Any]) -> None:
        """Refuse several continuations of one memory, which would all change it."""
        if not isinstance(cache, TTTCache):
            raise ValueError(
                f"`cache` is a `{type(cache).__name__}`, which has no place for fast weights: pass a `TTTCache`, as "
                "`model.read(...)` returns, or none."
            )
        cache.validate_facts(self.cache_facts())
        times = 1
        for name in ("num_return_sequences", "num_beams"):
            value = kwargs.get(name, getattr(given, name, None))
            times = max(times, value or 1)
        rows = None if prompts is None else len(prompts)
        if rows is not None and cache.rows is not None and cache.rows != rows * times:
            raise ValueError(
                f"the cache holds {cache.rows} rows, but {rows} prompts with {times} continuations each are "
                f"{rows * times}, and every one learns by itself: pass "
                f"`cache=memory.repeat({max(rows * times // cache.rows, 1)})`."
            )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, read_before: int = 0, learn: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The tokens that the cache has not read yet; transformers calls it before every forward."""
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if learn is None:
            learn = bool(kwargs.get("is_first_iteration", False)) or self.settings.learn_while_generating
        if cache is None:
            return {"input_ids": input_ids, "learn": learn}
        return {"input_ids": input_ids[:, cache.seen - read_before :], OUTPUT_NAME: cache, "learn": learn}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

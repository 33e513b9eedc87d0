"""Reading with a cache: `read()` and the forward of a TTT model that goes on from what was read before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..attention.cache_names import CACHE_NAMES, OUTPUT_NAME
from .fast_cache import TTTCache
from .forward_checks import (
    as_tokens,
    find_one_cache,
    validate_batch,
    validate_continuation,
    validate_learn,
    validate_shapes,
    validate_vocabulary,
)
from .inner import token_losses
from .reading import Reader, read_tokens, validate_reading
from .weight_checksum import WeightChecksum, active_adapters


@dataclass
class TTTOutput(CausalLMOutputWithPast):
    """transformers' output, and hidden states after the final norm, which TRL's SFT scores."""

    last_hidden_state: torch.Tensor | None = None


class CachedForwardMixin:
    """A model's methods that read into a [`TTTCache`]."""

    settings: Any  # these of the model
    parts: Any
    primes: Any
    named_parameters: Any
    modules: Any
    inner_learning_rate: float
    weight_checksum: WeightChecksum
    training: bool
    get_output_embeddings: Any
    _validate_model: Any
    _suffix: Any
    _step: Any
    _ignored: Any

    def cache_facts(self, fresh: bool = False, checked: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a cache must agree on with the model: sizes, settings of the steps, precision, adapters, weights.

        Args:
            fresh (`bool`): look at the weights themselves, and not whether they were changed in place.
            checked (`dict`, *optional*): what [`weight_facts`] has found before, to be taken as it is.
        """
        settings, parts = self.settings, self.parts
        facts = {"window": settings.window, "chunk_tokens": settings.chunk_tokens, "layers": len(parts.layers)}
        facts |= {"suffix_layers": settings.suffix_layers}
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            facts[name] = getattr(parts.config, name, None)
        facts |= {"fast_intermediate_size": settings.fast_intermediate_size}
        facts |= {"inner_learning_rate": self.inner_learning_rate}
        facts |= {"inner_max_grad_norm": settings.inner_max_grad_norm}
        # Not that of autocast, which trainers leave on for `forward` alone: windows are cast where they are used.
        facts["dtype"] = str(parts.embedding.weight.dtype).removeprefix("torch.")
        facts["bos_token_id"] = "none" if self._ignored() is None else self._ignored()
        facts["attention_scaling"] = getattr(parts.rotary, "attention_scaling", None)
        for name in ("rms_norm_eps", "hidden_act"):
            facts[name] = getattr(parts.config, name, None)
        return facts | (self.weight_facts(fresh) if checked is None else checked)

    def weight_facts(self, fresh: bool = False) -> dict[str, Any]:
        """The facts that all modules and parameters are looked at for."""
        # What PEFT trains in full stands beside a copy that never runs.
        used = [p for name, p in self.named_parameters() if "original_module" not in name.split(".")]
        weights = self.weight_checksum.of([*used, *self.parts.rotary.buffers()], fresh)
        return {"adapters": active_adapters(self.modules()), "weights": weights}

    def make_cache(self) -> TTTCache:
        """A cache that has read nothing."""
        return TTTCache(**self.cache_facts())

    def read(
        self,
        input_ids: torch.Tensor,
        cache: TTTCache | None = None,
        learn: bool = True,
        attention_mask: torch.Tensor | None = None,
        **given: Any,
    ) -> TTTCache:
        """Read tokens, and return what is left of them: fast weights and the last window, of one size.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): of any length; no padding.
            cache ([`TTTCache`], *optional*): changed in place and returned; a new one unless given. If an exception
                ends the reading, it refuses all later use.
            learn (`bool`): whether steps are taken.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): of ones, as a tokenizer returns it.
            given: what else a tokenizer returns and what changes no number; all else is refused.

        Raises:
            NotImplementedError: rows of unequal length.
            RuntimeError: a cache that cannot go on, or a step that is not finite.
            ValueError: shapes, an argument that there is not, or a cache of another model.
        """
        self._validate_model()
        position_ids = given.pop("position_ids", None)
        validate_batch(given, input_ids, attention_mask)
        validate_shapes(input_ids, least=0)
        cache = self.make_cache() if cache is None else cache
        find_one_cache({CACHE_NAMES[0]: cache})
        validate_continuation(input_ids, attention_mask, position_ids, cache.known)
        with cache.changing("`read()`"):
            for _ in self.read_pieces(input_ids, cache, learn, fresh=True):
                pass
        return cache

    @torch.no_grad()
    def read_logits(
        self, input_ids: torch.Tensor, cache: TTTCache | None = None, learn: bool = True
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and the tokens that they should have predicted, `(B, n, V)` and `(B, n)`, a piece at a time."""
        self._validate_model()
        cache, begin = self.make_cache() if cache is None else cache, 0
        for hidden in self.read_pieces(input_ids, cache, learn):
            targets = as_tokens(input_ids[:, begin + 1 : begin + 1 + hidden.shape[1]])
            begin += hidden.shape[1]
            if targets.shape[1]:
                yield self.get_output_embeddings()(hidden[:, : targets.shape[1]]), targets

    def read_losses(self, input_ids: torch.Tensor, cache: TTTCache | None = None, learn: bool = True) -> torch.Tensor:
        """The loss of every next token while reading, `(B, T - 1)`, without keeping logits."""
        losses = [token_losses(*pair) for pair in self.read_logits(input_ids, cache, learn)]
        return torch.cat(losses, 1) if losses else torch.zeros(len(input_ids), 0, device=input_ids.device)

    def read_pieces(self, input_ids: torch.Tensor, cache: TTTCache, learn: bool, fresh: bool = False) -> Any:
        """Read tokens into a cache; hidden states after the final norm, a piece at a time."""
        parts, settings = self.parts, self.settings
        find_one_cache({CACHE_NAMES[0]: cache})
        facts = self.cache_facts(fresh, cache.checked)
        cache.validate_facts(facts)
        validate_shapes(input_ids, least=0)
        validate_vocabulary(input_ids, parts.embedding.weight.shape[0])
        self._validate_device(cache)
        validate_reading(cache, input_ids, validate_learn(learn))
        assert settings.window is not None
        sizes = settings.window, settings.chunk_tokens, self._ignored()
        reader = Reader(parts.run_prefix, parts.rotation, self._suffix(parts), self._step(), *sizes)
        return _read(reader, cache, as_tokens(input_ids), learn, facts)

    def _validate_device(self, cache: TTTCache) -> None:
        here = next(self.primes.parameters()).device
        if cache.fast and cache.fast[0].device != here:
            raise ValueError(
                f"the cache is on {cache.fast[0].device}, but the model's prime MLPs are on {here}: pass "
                f"`memory.to({str(here)!r})`."
            )

    def _forward_with_cache(
        self, input_ids: Any, cache: TTTCache, learn: bool, logits_to_keep: Any, rest: tuple[Any, Any, dict]
    ) -> TTTOutput:
        attention_mask, position_ids, given = rest
        validate_batch(given, input_ids, attention_mask)
        validate_shapes(input_ids)
        validate_continuation(input_ids, attention_mask, position_ids, cache.known)
        with cache.changing("`forward`"):
            hidden = torch.cat(list(self.read_pieces(input_ids, cache, learn)), 1)
            with torch.no_grad():
                logits = self.get_output_embeddings()(keep_last(hidden, logits_to_keep))
        return TTTOutput(logits=logits, last_hidden_state=hidden, **{OUTPUT_NAME: cache})

    def _validate_untrained(self, labels: Any, shift_labels: Any) -> None:
        if labels is not None or shift_labels is not None or (self.training and torch.is_grad_enabled()):
            raise ValueError(
                "a cache holds what was read without a graph, so no loss can be trained through it: pass whole rows "
                "without `cache` and `use_cache` to train."
            )


def keep_last(tokens: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Those of `(B, t, ...)` that have logits: the last ones, or those at given places."""
    return tokens[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


def _read(
    reader: Reader, cache: TTTCache, input_ids: torch.Tensor, learn: bool, facts: dict
) -> Iterator[torch.Tensor]:
    """Read what `generate()` wrote last, and then the tokens."""
    with cache.changing("reading", in_place=True):
        unread, cache.unread = cache.unread, None
        unread = input_ids[:, :0] if unread is None else unread.to(input_ids)
        cache.begin_reading(torch.cat((unread, input_ids), 1), facts)
        for _ in read_tokens(reader, cache, unread, learn):
            pass
        yield from read_tokens(reader, cache, input_ids, learn)

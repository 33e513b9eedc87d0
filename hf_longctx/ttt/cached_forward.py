"""Reading with a cache: `read()` and the forward of a TTT model that goes on from what was read before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..attention.cache_names import OUTPUT_NAME
from .fast_cache import TTTCache
from .forward_checks import validate_shapes
from .inner import token_losses
from .reading import Reader, read_tokens


@dataclass
class TTTOutput(CausalLMOutputWithPast):
    """transformers' output, and hidden states after the final norm, which TRL's SFT scores."""

    last_hidden_state: torch.Tensor | None = None


class CachedForwardMixin:
    """A model's methods that read into a [`TTTCache`]."""

    settings: Any  # these of the model
    parts: Any
    training: bool
    get_output_embeddings: Any
    _suffix: Any
    _step: Any
    _ignored: Any

    def cache_facts(self) -> dict[str, int]:
        """What a cache must agree on with the model."""
        settings, layers = self.settings, len(self.parts.layers)
        facts = {"window": settings.window, "chunk_tokens": settings.chunk_tokens, "layers": layers}
        return {**facts, "suffix_layers": settings.suffix_layers}

    def make_cache(self) -> TTTCache:
        """A cache that has read nothing."""
        return TTTCache(**self.cache_facts())

    def read(self, input_ids: torch.Tensor, cache: TTTCache | None = None, learn: bool = True) -> TTTCache:
        """Read tokens, and return what is left of them: fast weights and the last window, of one size.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): of any length; no padding.
            cache ([`TTTCache`], *optional*): changed in place and returned; a new one unless given.
            learn (`bool`): whether steps are taken.
        """
        cache = self.make_cache() if cache is None else cache
        for _ in self.read_pieces(input_ids, cache, learn):
            pass
        return cache

    @torch.no_grad()
    def read_logits(
        self, input_ids: torch.Tensor, cache: TTTCache | None = None, learn: bool = True
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and the tokens that they should have predicted, `(B, n, V)` and `(B, n)`, a piece at a time."""
        cache, begin = self.make_cache() if cache is None else cache, 0
        for hidden in self.read_pieces(input_ids, cache, learn):
            targets = input_ids[:, begin + 1 : begin + 1 + hidden.shape[1]]
            begin += hidden.shape[1]
            if targets.shape[1]:
                yield self.get_output_embeddings()(hidden[:, : targets.shape[1]]), targets

    def read_losses(self, input_ids: torch.Tensor, cache: TTTCache | None = None, learn: bool = True) -> torch.Tensor:
        """The loss of every next token while reading, `(B, T - 1)`, without keeping logits."""
        return torch.cat([token_losses(*pair) for pair in self.read_logits(input_ids, cache, learn)], 1)

    def read_pieces(self, input_ids: torch.Tensor, cache: TTTCache, learn: bool) -> Any:
        """Read tokens into a cache; hidden states after the final norm, a piece at a time."""
        parts, settings = self.parts, self.settings
        cache.validate_facts(self.cache_facts())
        validate_shapes(input_ids, least=0)
        assert settings.window is not None
        sizes = settings.window, settings.chunk_tokens, self._ignored()
        reader = Reader(parts.run_prefix, parts.rotation, self._suffix(parts), self._step(), *sizes)
        return read_tokens(reader, cache, input_ids, learn)

    def _forward_with_cache(
        self, input_ids: Any, cache: TTTCache, labels: Any, learn: bool, logits_to_keep: int
    ) -> TTTOutput:
        if not isinstance(cache, TTTCache):
            raise ValueError(
                f"`cache` is a `{type(cache).__name__}`, which has no place for fast weights: pass a `TTTCache`, as "
                "`model.read(...)` returns, or none."
            )
        if labels is not None or (self.training and torch.is_grad_enabled()):
            raise ValueError(
                "a cache holds what was read without a graph, so no loss can be trained through it: pass whole rows "
                "without `cache` to train."
            )
        validate_shapes(input_ids)
        pieces = list(self.read_pieces(input_ids, cache, learn))
        hidden = torch.cat(pieces, 1)
        hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        with torch.no_grad():
            logits = self.get_output_embeddings()(hidden)
        return TTTOutput(logits=logits, last_hidden_state=hidden, **{OUTPUT_NAME: cache})

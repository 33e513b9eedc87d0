"""How a TTT model comes to be: from a base model, from a folder, and with another vocabulary or kernel."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from ..config.test_time import TTTConfig
from .base_comparison import compare_parts
from .base_parts import find_decoder
from .base_settings import complete_settings
from .fast_config import TTTModelConfig


class LoadingMixin:
    """In front of `PreTrainedModel`."""

    base: Any  # these of the model
    config: Any

    @classmethod
    def from_base(cls, base: Any, settings: TTTConfig | None = None, **kwargs: Any) -> Any:
        """Add fast weights to a model that has none. Before training it is that model with a sliding window.

        Args:
            base (`str` or `PreTrainedModel`): hub id, folder, or a causal language model, which is held, not copied.
            settings ([`TTTConfig`], *optional*): of the fast weights.
            kwargs: for `AutoModelForCausalLM.from_pretrained`. `attn_implementation` is that of the layers before the
                suffix, by default `"packed"`, which makes no `T x T` mask.

        Raises:
            ValueError: settings that the base model does not allow.
            NotImplementedError: a base model that is not laid out as Llama is.
        """
        if isinstance(base, str):
            kwargs.setdefault("attn_implementation", "packed")
            base = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        find_decoder(base)
        settings = complete_settings(settings or TTTConfig(), base.config)
        if getattr(base.config, "sliding_window", None) is not None:
            base.config.sliding_window = settings.window
        config = TTTModelConfig.of(base.config, settings)
        config._attn_implementation_internal = base.config._attn_implementation
        make: Any = cls
        return make(config, base)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; arguments are transformers'.

        Raises:
            ValueError: the weights were trained with another window or chunk length than the configuration's.
        """
        kwargs.setdefault("attn_implementation", "packed")
        wants_info = kwargs.pop("output_loading_info", False)
        library: Any = super()
        model, info = library.from_pretrained(*args, output_loading_info=True, **kwargs)
        model.primes.check_loaded({name.removeprefix("primes.") for name in info["missing_keys"]})
        compare_parts(model.base, model.parts)
        return (model, info) if wants_info else model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """transformers', on the base model."""
        embedding = self.base.resize_token_embeddings(*args, **kwargs)
        size = self.config.vocab_size = self.base.config.vocab_size
        self.config.base_config = {**(self.config.base_config or {}), "vocab_size": size}
        return embedding

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Choose the kernel of the layers before the suffix; that of the suffix is `suffix_attention`."""
        self.base.set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config._attn_implementation_internal = self.base.config._attn_implementation

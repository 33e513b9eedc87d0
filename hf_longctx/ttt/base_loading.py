"""How a TTT model comes to be: from a base model, from a folder, and with another vocabulary or kernel."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ..config.test_time import FAST_WEIGHTS, TTTConfig
from .base_comparison import compare_parts
from .base_parts import find_decoder
from .base_settings import complete_settings, window_of
from .fast_config import TTTModelConfig
from .held_base import validate_free


_SETTINGS = tuple(field.name for field in dataclasses.fields(TTTConfig))
# What the checkpoint holds and no argument changes. Token ids may be others, as transformers allows for every model.
_FIXED = (
    *_SETTINGS,
    *("ttt", "base_config", "base_name"),
    *("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings"),
)


class LoadingMixin:
    """In front of `PreTrainedModel`."""

    base: Any  # these of the model
    primes: Any
    config: Any

    @classmethod
    def from_base(cls, base: Any, settings: TTTConfig | None = None, **kwargs: Any) -> Any:
        """Add fast weights to a model that has none. Before training it is that model with a sliding window.

        Args:
            base (`str`, `Path` or `PreTrainedModel`): hub id, folder, or a causal language model, which is held, not
                copied. Its `generation_config` is taken over.
            settings ([`TTTConfig`], *optional*): of the fast weights.
            kwargs: for `AutoModelForCausalLM.from_pretrained`; none next to a model. `attn_implementation` is that of
                the layers before the suffix, by default `"packed"`, which makes no `T x T` mask.

        Raises:
            ValueError: settings that the base model does not allow, or a base that is no language model of
                transformers by itself.
            NotImplementedError: a base model that is not laid out as Llama is.
        """
        if of_settings := [name for name in kwargs if name in _SETTINGS]:
            raise ValueError(
                f"`{of_settings[0]}` ({kwargs[of_settings[0]]!r}) is a field of the settings: pass "
                f"`TTTConfig({of_settings[0]}=...)` as second argument."
            )
        if isinstance(base, (str, os.PathLike)):
            base = _load_base(base, kwargs)
        elif kwargs:
            name, value = next(iter(kwargs.items()))
            raise ValueError(
                f"`{name}` ({value!r}) is an argument for loading a base model by name, and `base` is a "
                f"`{type(base).__name__}` that is loaded already: leave it out, and load the model with it."
            )
        validate_base(base)
        validate_free(base)
        settings = complete_settings(TTTConfig() if settings is None else settings, base.config)
        if window_of(base.config) is not None:
            base.config.sliding_window = settings.window
        config = TTTModelConfig.of(base.config, settings)
        config._attn_implementation_internal = base.config._attn_implementation
        make: Any = cls
        return make(config, base)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; arguments are transformers'.

        Raises:
            ValueError: a setting of the checkpoint is given as an argument; the weights were trained with other
                settings than the configuration's, or are not all there.
        """
        for name in kwargs:
            if name in _FIXED:
                raise ValueError(
                    f"`{name}` ({kwargs[name]!r}) is a setting of the checkpoint, which was trained with it: leave it "
                    "out, or build another model with `TTTForCausalLM.from_base(...)`."
                )
        kwargs.setdefault("attn_implementation", "packed")
        wants_info = kwargs.pop("output_loading_info", False)
        library: Any = super()
        model, info = library.from_pretrained(*args, output_loading_info=True, **kwargs)
        model.primes.check_loaded({name.removeprefix("primes.") for name in info["missing_keys"]})
        _validate_loaded(info)
        compare_parts(model.base, model.parts)
        return (model, info) if wants_info else model

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """transformers', which fills tensors by itself; prime MLPs that are lost, or of other settings, raise.

        Some versions find no place for modules that an adapter saves whole.
        """
        library: Any = super()
        found = library.load_adapter(*args, **kwargs)
        lost = sorted(name for name in getattr(found, "unexpected_keys", None) or () if "prime_" in name)
        if lost:
            raise ValueError(
                f"`load_adapter` of transformers found no place for `{lost[0]}` of the adapter, which would be lost: "
                "load it with `peft.PeftModel.from_pretrained(model, ...)`."
            )
        self.primes.check_loaded(set())
        return found

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


def _load_base(name: Any, kwargs: dict[str, Any]) -> Any:
    kwargs.setdefault("attn_implementation", "packed")
    try:
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except ValueError as error:  # transformers advises to upgrade it
        if FAST_WEIGHTS not in str(error):
            raise
        raise ValueError(
            f"`base` ({str(name)!r}) already has fast weights: load it with `TTTForCausalLM.from_pretrained`."
        ) from error


def validate_base(base: Any) -> None:
    """Raise for anything but a whole model of transformers that predicts the next token.

    Whatever wraps the weights would be in their names, so that nothing could be loaded again.
    """
    name = type(base).__name__
    if isinstance(getattr(base, "config", None), TTTModelConfig):
        raise ValueError(
            f"`base` (`{name}`) already has fast weights: train it as it is, or give the model that it was made from."
        )
    if hasattr(base, "peft_config") or any(hasattr(module, "base_layer") for module in _modules(base)):
        raise ValueError(
            f"`base` (`{name}`) has adapters, which a model with fast weights would neither save nor load with it: "
            "call `merge_and_unload()` first, or build the model from the base and adapt that."
        )
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"`base` (`{name}`) must be a hub id, a folder or a causal language model of transformers as it was "
            "loaded, not wrapped and not its configuration."
        )
    find_decoder(base)
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"`base` (`{name}`) has no head that predicts the next token: load it with `AutoModelForCausalLM`."
        )


def _modules(base: Any) -> Any:
    return base.modules() if isinstance(base, PreTrainedModel) else ()


def _validate_loaded(info: dict[str, Any]) -> None:
    """Raise `ValueError` for weights of the base model that a checkpoint lacks, or that have no place in the model."""
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("primes."))
    mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if lost := [*missing, *mismatched]:
        raise ValueError(
            f"the checkpoint has no `{lost[0]}` of the model's shape ({len(lost)} weights in all), which would start "
            "from random numbers: load what `save_pretrained` wrote of the whole model; that of an adapter writes the "
            "adapter alone (`merge_and_unload()` first)."
        )
    if unknown := sorted(info["unexpected_keys"]):
        raise ValueError(
            f"the checkpoint has `{unknown[0]}` ({len(unknown)} weights in all), for which this model has no place, "
            "so what was trained would be lost: load it with its own configuration, and merge adapters before they "
            "are saved."
        )

"""`TTTModelConfig`: the `config.json` of a TTT model: its base's configuration and `TTTConfig`.

Its `model_type` is not registered with transformers, so `AutoModel` and `AutoConfig` raise instead of loading the base
without what it learned.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from ..attention.cache_names import OUTPUT_NAME
from ..config.test_time import FAST_WEIGHTS, TTTConfig


# What generation and trainers ask of a configuration, taken over from the base's.
_MIRRORED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)


class TTTModelConfig(PreTrainedConfig):
    """Configuration of [`TTTForCausalLM`].

    Args:
        base_config (`dict`): that of the base model, with its `model_type`.
        base_name (`str`, *optional*): where the base model was loaded from.
        ttt (`dict`): the fields of [`TTTConfig`], all set.
        kwargs: those of `PreTrainedConfig`.
    """

    model_type = FAST_WEIGHTS
    keys_to_ignore_at_inference: ClassVar[list[str]] = [OUTPUT_NAME, "last_hidden_state"]  # metrics get logits
    base_config: dict | None = None
    base_name: str | None = None
    ttt: dict | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    max_position_embeddings: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def of(cls, base: PreTrainedConfig, ttt: TTTConfig) -> TTTModelConfig:
        """For a base model and settings, both complete."""
        mirrored = {name: getattr(base, name) for name in _MIRRORED if hasattr(base, name)}
        name = getattr(base, "_name_or_path", None) or None
        return cls(
            base_config=base.to_dict(), base_name=name, ttt=dataclasses.asdict(ttt), dtype=base.dtype, **mirrored
        )

    def build_base(self) -> Any:
        """The base model's configuration."""
        if not self.base_config or not self.ttt:
            raise ValueError(
                "this configuration has no `base_config` and `ttt`: build it with `TTTForCausalLM.from_base(...)`, or "
                "load a checkpoint that was saved by one."
            )
        fields = dict(self.base_config)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)

    @property
    def settings(self) -> TTTConfig:
        """The settings, as they were given."""
        return TTTConfig(**(self.ttt or {}))


def validate_made(config: Any, unknown: dict[str, Any]) -> None:
    """Raise `ValueError` for a model that is made from another configuration, or with arguments that it has not."""
    if not isinstance(config, TTTModelConfig):
        raise ValueError(
            f"`config` (`{type(config).__name__}`) must be a `TTTModelConfig`: build the model with "
            "`TTTForCausalLM.from_base(...)`, or load a checkpoint that was saved by one."
        )
    if unknown:
        name, value = next(iter(unknown.items()))
        raise ValueError(f"`{name}` ({value!r}) is no argument of a model with fast weights: leave it out.")

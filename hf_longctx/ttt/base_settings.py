"""`TTTConfig` with everything set that a base model decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config.lsh_settings import LSH_KEY
from ..config.test_time import TTTConfig


def complete_settings(settings: TTTConfig, base: Any) -> TTTConfig:
    """Fill in what the configuration of a base model decides, and refuse what it does not allow.

    Args:
        settings ([`TTTConfig`]): what the user wants.
        base: the base model's configuration.

    Raises:
        ValueError: no `TTTConfig`; a window that is not set, or wider than the base's; too many suffix layers.
        NotImplementedError: attention that knows no window.
    """
    if not isinstance(settings, TTTConfig):
        raise ValueError(
            f"`settings` ({settings!r}) must be a `TTTConfig`: write `TTTConfig(window=2048)`, or leave it out."
        )
    text, name = base.get_text_config(), base.model_type
    if getattr(text, LSH_KEY, None) is not None or getattr(text, "_attn_implementation", None) == "lsh":
        raise NotImplementedError(
            f"`{name}` runs LSH attention, which knows no window, and a model with fast weights has one: take a base "
            'model that was trained with ordinary attention, on `attn_implementation="packed"`.'
        )
    own = window_of(text)
    window, layers = settings.window if settings.window is not None else own, text.num_hidden_layers
    if window is None:
        raise ValueError(
            f"`window` is unset and `{name}` attends to all tokens, so nothing would have to be remembered: set how "
            "many tokens attention sees, such as `--window 2048` or `TTTConfig(window=2048)`."
        )
    if own is not None and window > own:
        raise ValueError(
            f"`window` ({window}) is wider than the window of `{name}` ({own}), which it was trained with: set at "
            f"most {own}, or leave it out."
        )
    suffix = max(1, layers // 4) if settings.suffix_layers is None else settings.suffix_layers
    if suffix >= layers:
        raise ValueError(
            f"`suffix_layers` ({suffix}) must be below the number of layers ({layers}): the layers before read whole "
            "rows at once; a quarter is usual."
        )
    width = settings.fast_intermediate_size
    if width is None:
        width = text.intermediate_size
    return replace(settings, window=window, suffix_layers=suffix, fast_intermediate_size=width)


def window_of(text: Any) -> int | None:
    """The tokens that attention of a base model sees by its configuration, or `None` where it sees all of them."""
    window = getattr(text, "sliding_window", None)
    if not window or getattr(text, "use_sliding_window", True) is False:
        return None
    kinds = getattr(text, "layer_types", None)
    return window if not kinds or any(kind == "sliding_attention" for kind in kinds) else None

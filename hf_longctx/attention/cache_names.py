"""What transformers calls a cache of keys, values or states: `cache` since 5.24, other names before.

The older names are still taken until 5.40, so both are looked for wherever an argument or an output may hold one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast


CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# The argument of a position embedding with the number of tokens in the cache.
CACHE_LENGTH_NAMES = ("cache_length", "past_key_values_length")
# The field of an output of a causal language model, in the transformers that is installed.
OUTPUT_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def find_cache(values: Mapping[str, object]) -> object | None:
    """The cache among the arguments of a call or the fields of an output, or `None`."""
    # No older name is read from an output: it would warn, and return the cache of the new one.
    return next((value for name, value in values.items() if name in CACHE_NAMES and value is not None), None)


def cache_argument(forward: Callable) -> str:
    """What the cache is called among the arguments of a layer's forward."""
    return next(name for name in inspect.signature(forward).parameters if name in CACHE_NAMES)

"""The mask function of our names: it keeps transformers' description of a mask and builds nothing.

In transformers every attention name turns a description into its own object. Under sharding that object would only
know local tokens, and for packed rows it has `T x T` entries. The attention function gets the description instead. It
then either builds the inner kernel's own mask from it (one document a row, no shard), or reads the rule out of it (see
[`masks`][hf_longctx.attention.masks]).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks

from .masks import AttentionRule, read_rule


class DeferredMask:
    """transformers' description of a mask, not yet built.

    Holds the arguments transformers passes to a mask function: `batch_size, q_length, kv_length, q_offset, kv_offset,
    mask_function, attention_mask, dtype, device, ...`. One object serves all layers of a forward.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._cast: torch.dtype | None = None
        self._built: dict[str, object] = {}
        self._shared: dict[str, Any] = {}

    def build(self, kernel: str) -> object:
        """The mask that `kernel` itself would have got: a tensor, a block mask or `None`."""
        if kernel not in self._built:
            built = ALL_MASK_ATTENTION_FUNCTIONS[kernel](**self._arguments)
            self._built[kernel] = built if self._cast is None or built is None else built.to(self._cast)
        return self._built[kernel]

    def rule(self) -> AttentionRule:
        """The rule behind the mask, free of local indices.

        Raises:
            NotImplementedError: the mask holds a function we cannot read.
        """
        return read_rule(self.mask_function)

    @property
    def mask_function(self) -> Callable:
        """transformers' index function, documents included."""
        return self._arguments["mask_function"]

    def with_function(self, mask_function: Callable) -> DeferredMask:
        """The same description with another index function."""
        return DeferredMask({**self._arguments, "mask_function": mask_function})

    @property
    def may_be_left_out(self) -> bool:
        """Whether transformers builds no mask where a causal kernel would need none."""
        return bool(self._arguments.get("allow_is_causal_skip", True))

    @property
    def padding(self) -> torch.Tensor | None:
        """The 2-D mask of the batch, `(B, T)`, or `None`."""
        return self._arguments.get("attention_mask")

    def restricted(self, mask_function: Callable) -> DeferredMask:
        """The description of keys that another index function lets through as well."""
        both = and_masks(self.mask_function, mask_function)
        restricted = DeferredMask({**self._arguments, "mask_function": both})
        restricted._shared = self._shared
        return restricted

    def once(self, name: str, read: Callable) -> Any:
        """What `read()` returns, computed once under this name for all layers of the forward."""
        if name not in self._shared:
            self._shared[name] = read()
        return self._shared[name]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        arguments = self._arguments
        return arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"]

    @property
    def num_keys(self) -> int | None:
        """Keys that transformers describes, or `None` where it does not say."""
        return self._arguments.get("kv_length")

    @property
    def offset(self) -> int | torch.Tensor:
        """How many tokens the first query is after the first key, as with a cache."""
        return self._arguments.get("q_offset", 0) - self._arguments.get("kv_offset", 0)

    @property
    def ndim(self) -> int:
        return 4

    def to(self, device: torch.device | str | torch.dtype, **_: object) -> DeferredMask:
        """The same description on `device`, for models that are split over devices; or a mask built in a precision."""
        if isinstance(device, torch.dtype):
            cast = DeferredMask(self._arguments)
            cast._cast, cast._shared = device, self._shared
            return cast
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self._arguments.items()}
        return DeferredMask({**moved, "device": device})

    def contiguous(self) -> DeferredMask:
        """Itself: `generate()` asks this of a mask it prepared for a static cache."""
        return self

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    def __getitem__(self, _: object) -> object:
        self._refuse("[...]")

    def __add__(self, _: object) -> object:
        self._refuse("+")

    __radd__ = __add__

    def __mul__(self, _: object) -> object:
        self._refuse("*")

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Torch asks this of what is no tensor, as in `scores.masked_fill(mask, value)`."""
        cls._refuse(getattr(function, "__name__", str(function)))

    @staticmethod
    def _refuse(name: str) -> NoReturn:
        raise NotImplementedError(
            f"this model edits its attention mask itself (`{name}`), which attn_implementation='ulysses' or 'packed' "
            "cannot follow: call `hf_longctx.adapt(model, mesh)` before its first batch, or use 'sdpa' or 'eager' for "
            "it, without sharding."
        )


def deferred_mask(**arguments: object) -> object:
    """The mask function registered for our names: keep transformers' description for the attention function."""
    prepared = arguments.get("attention_mask")
    if isinstance(prepared, DeferredMask):
        return prepared
    # A static cache counts its tokens in place: what is built later must know how many there were before this forward.
    found = ((name, arguments.get(name)) for name in ("q_offset", "kv_offset"))
    offsets = {name: value.clone() for name, value in found if isinstance(value, torch.Tensor)}
    return DeferredMask({**arguments, **offsets})

"""`TTTCache`: what a model remembers of all that it read, in a size that does not depend on how much that was.

It holds the fast weights, the last keys and values of every layer, and the unfinished chunk: its tokens and what left
the attention of the first suffix layer for them, since the step is due when the token after the chunk has been read.
All buffers have their full size from the first token on.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .prime import Fast
from .prime_blocks import KeysValues


_FORMAT = 2  # of a file; in the first, the unfinished chunk was held from before the suffix's first attention


class TokenBuffer:
    """The last tokens of something, `(B, ..., tokens, H)`, in memory of one size.

    Args:
        capacity (`int`): tokens that it holds at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.data: torch.Tensor | None = None

    def append(self, tokens: torch.Tensor) -> None:
        count = tokens.shape[-2]
        if self.data is None:
            self.data = tokens.new_zeros(*tokens.shape[:-2], self.capacity, tokens.shape[-1])
        self.data[..., self.length : self.length + count, :] = tokens
        self.length += count

    def last(self, count: int, behind: int = 0) -> torch.Tensor:
        """The last `count` tokens, or as many as there are, before the last `behind` ones."""
        assert self.data is not None
        end = self.length - behind
        return self.data[..., max(end - count, 0) : end, :]

    def keep(self, count: int) -> None:
        """Forget all but the last `count` tokens."""
        if self.data is not None and self.length > count:
            kept = self.last(count).clone()
            self.data[..., :count, :] = kept
            self.length = count


class LayerWindow:
    """Keys and values of one layer, which its attention adds to.

    Args:
        window (`int`): tokens that a token sees.
        capacity (`int`): tokens that are held at most.
    """

    def __init__(self, window: int, capacity: int) -> None:
        self.window = window
        self.keys, self.values = TokenBuffer(capacity), TokenBuffer(capacity)

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> KeysValues:
        """What transformers' attention calls with new keys and values; returns all that the new tokens may see."""
        self.keys.append(key)
        self.values.append(value)
        seen = self.window - 1 + key.shape[-2]
        return self.keys.last(seen), self.values.last(seen)

    def before(self, behind: int) -> KeysValues:
        """What the tokens that are `behind` see of those before them."""
        return self.keys.last(self.window - 1, behind), self.values.last(self.window - 1, behind)

    def fill(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Hold these, and nothing before them."""
        self.keys.length = self.values.length = 0
        self.update(key, value)

    def keep(self, count: int) -> None:
        self.keys.keep(count)
        self.values.keep(count)

    @property
    def length(self) -> int:
        return self.keys.length


class TTTCache:
    """Memory of a [`TTTForCausalLM`]: pass it as `cache` (`past_key_values` before transformers 5.24).

    Args:
        window, chunk_tokens, layers, suffix_layers (`int`): of the model.

    Attributes:
        seen (`int`): tokens read so far.
        steps (`int`): steps that its fast weights took.
        nbytes (`int`): its size.
    """

    is_compileable = False
    is_linear = (False,)
    is_sliding = (True,)

    def __init__(self, window: int, chunk_tokens: int, layers: int, suffix_layers: int) -> None:
        self.facts = {
            "window": window,
            "chunk_tokens": chunk_tokens,
            "layers": layers,
            "suffix_layers": suffix_layers,
        }
        capacity = window - 1 + chunk_tokens
        self.windows = [LayerWindow(window, capacity) for _ in range(layers)]
        self.pending = TokenBuffer(chunk_tokens)
        self.pending_ids: torch.Tensor | None = None
        self.fast: Fast = []
        self.seen = self.steps = 0
        self.is_frozen = False

    @property
    def rows(self) -> int | None:
        """Rows that it holds, or `None` before the first token."""
        return len(self.fast[0]) if self.fast else None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, as transformers asks a cache."""
        return self.seen

    def copy(self) -> TTTCache:
        """The same memory, which can go on by itself."""
        return copy.deepcopy(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take rows `beam_idx`, in that order: windows, the unfinished chunk and fast weights."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def repeat(self, times: int) -> TTTCache:
        """A copy with every row `times` times, one after the other, as `generate()` repeats its prompts."""
        repeated = self.copy()
        repeated._map(lambda tensor: tensor.repeat_interleave(times, 0))
        return repeated

    def to(self, device: torch.device | str) -> TTTCache:
        """A copy on another device."""
        moved = self.copy()
        moved._map(lambda tensor: tensor.to(device))
        return moved

    def validate_facts(self, facts: dict[str, int]) -> None:
        """Raise `ValueError` unless it belongs to a model with these facts."""
        for name, value in facts.items():
            if self.facts[name] != value:
                raise ValueError(
                    f"the cache was made with `{name}` {self.facts[name]}, but the model has {value}: use it with the "
                    "model that read into it, or read again."
                )

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file."""
        if not self.fast:
            raise RuntimeError("the cache has read nothing, so nothing can be saved: call `model.read(...)` first.")
        state = {
            **self.facts,
            "format": _FORMAT,
            "seen": self.seen,
            "steps": self.steps,
            "is_frozen": self.is_frozen,
            "lengths": [window.length for window in self.windows],
            "pending": self.pending.length,
        }
        tensors = {name: tensor.contiguous().clone() for name, tensor in self._tensors().items()}
        save_file(tensors, str(path), metadata={"ttt_cache": json.dumps(state)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> TTTCache:
        """Read one back.

        Raises:
            ValueError: the file holds something else.
        """
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            state = json.loads((file.metadata() or {}).get("ttt_cache", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if not state:
            raise ValueError(f"`{path}` holds no `TTTCache`: give a file that `TTTCache.save` wrote.")
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"`{path}` is a `TTTCache` of format {state.get('format', 1)}, and this version reads format "
                f"{_FORMAT}, which holds something else of an unfinished chunk: read the text again."
            )
        cache = cls(*(state[name] for name in ("window", "chunk_tokens", "layers", "suffix_layers")))
        cache.seen, cache.steps, cache.is_frozen = state["seen"], state["steps"], state["is_frozen"]
        for index, (window, length) in enumerate(zip(cache.windows, state["lengths"], strict=True)):
            window.keys.data, window.values.data = tensors[f"keys.{index}"], tensors[f"values.{index}"]
            window.keys.length = window.values.length = length
        cache.pending.data, cache.pending.length = tensors["pending"], state["pending"]
        cache.pending_ids = tensors["pending_ids"]
        cache.fast = [tensors[f"fast.{index}"] for index in range(3 * state["suffix_layers"])]
        return cache

    def _buffers(self) -> dict[str, TokenBuffer]:
        each = {f"keys.{index}": window.keys for index, window in enumerate(self.windows)}
        each |= {f"values.{index}": window.values for index, window in enumerate(self.windows)}
        return {**each, "pending": self.pending}

    def _tensors(self) -> dict[str, torch.Tensor]:
        held: dict[str, Any] = {name: buffer.data for name, buffer in self._buffers().items()}
        held |= {"pending_ids": self.pending_ids, **{f"fast.{i}": weight for i, weight in enumerate(self.fast)}}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def _map(self, change: Any) -> None:
        for buffer in self._buffers().values():
            buffer.data = None if buffer.data is None else change(buffer.data)
        self.pending_ids = None if self.pending_ids is None else change(self.pending_ids)
        self.fast = [change(weight) for weight in self.fast]

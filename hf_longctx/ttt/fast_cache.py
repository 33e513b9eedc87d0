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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .cache_checks import CheckedCache
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
        return self.keys.last(seen).to(key.dtype), self.values.last(seen).to(value.dtype)

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


class TTTCache(CheckedCache):
    """Memory of a [`TTTForCausalLM`]: pass it as `cache` (`past_key_values` before transformers 5.24).

    Args:
        window, chunk_tokens, layers, suffix_layers (`int`): of the model.
        facts: what else it must agree on with the model ([`TTTForCausalLM.cache_facts`]).

    Attributes:
        seen (`int`): tokens read so far.
        steps (`int`): steps that its fast weights took.
        nbytes (`int`): its size.
        unread (`torch.Tensor` of shape `(B, t)`, *optional*): what `generate()` wrote last and has not read, its last
            token. It is read before whatever is read next.
        damage (`str`, *optional*): why nothing can be read into it or asked of it any more.
    """

    is_compileable = is_croppable = False
    is_linear = (False,)
    is_sliding = (True,)

    def __init__(self, window: int, chunk_tokens: int, layers: int, suffix_layers: int, **facts: Any) -> None:
        super().__init__(window=window, chunk_tokens=chunk_tokens, layers=layers, suffix_layers=suffix_layers, **facts)
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
        copied = copy.deepcopy(self)
        copied.checked = None
        return copied

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take rows `beam_idx`, in that order: windows, the unfinished chunk and fast weights."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def repeat(self, times: int) -> TTTCache:
        """A copy with every row `times` times, one after the other, as `generate()` repeats its prompts."""
        if not isinstance(times, int) or isinstance(times, bool) or times < 1:
            raise ValueError(f"`times` ({times!r}) must be a positive integer, the copies of each row.")
        repeated = self.copy()
        repeated._map(lambda tensor: tensor.repeat_interleave(times, 0))
        return repeated

    def to(self, device: torch.device | str) -> TTTCache:
        """A copy on another device."""
        if not isinstance(device, str | int | torch.device):
            raise TypeError(
                f"`device` ({device!r}) is no device, and a cache keeps the precision in which it was read: give one "
                "such as 'cuda', or read again with a model in another precision."
            )
        moved = self.copy()
        moved._map(lambda tensor: tensor.to(device))
        return moved

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file.

        Raises:
            FileNotFoundError: there is no such folder.
            RuntimeError: it has read nothing, or is damaged.
        """
        self.validate_whole()
        if not self.fast:
            raise RuntimeError("the cache has read nothing, so nothing can be saved: call `model.read(...)` first.")
        state = {
            "format": _FORMAT,
            "seen": self.seen,
            "steps": self.steps,
            "is_frozen": self.is_frozen,
            "frozen_by": self.frozen_by,
            "facts": self.facts,
            **{name: None if ids is None else ids.tolist() for name, ids in self._ids().items()},
            "lengths": [window.length for window in self.windows],
            "pending": self.pending.length,
        }
        if not Path(path).parent.is_dir() or Path(path).is_dir():
            raise FileNotFoundError(
                f"`{path}` is no place for a file, as its folder is missing or it is one itself: name a file in a "
                "folder that exists."
            )
        tensors = {name: tensor.contiguous().clone() for name, tensor in self._tensors().items()}
        save_file(tensors, str(path), metadata={"ttt_cache": json.dumps(state)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> TTTCache:
        """Read one back.

        Raises:
            ValueError: the file holds something else, or not all of a cache.
        """
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                state = json.loads((file.metadata() or {}).get("ttt_cache", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"`{path}` cannot be read ({error}), so it is cut short or no safetensors file: give a file that "
                "`TTTCache.save` wrote."
            ) from error
        if not state:
            raise ValueError(f"`{path}` holds no `TTTCache`: give a file that `TTTCache.save` wrote.")
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"`{path}` is a `TTTCache` of format {state.get('format', 1)}, and this version reads format "
                f"{_FORMAT}, which holds something else of an unfinished chunk: read the text again."
            )
        try:
            return cls._of(state, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{path}` lacks a part of a `TTTCache` ({type(error).__name__}: {error}), as files of other versions "
                "do: read again, and save with this version."
            ) from error

    @classmethod
    def _of(cls, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TTTCache:
        cache = cls(**state["facts"])
        cache.seen, cache.steps, cache.is_frozen = state["seen"], state["steps"], state["is_frozen"]
        cache.frozen_by = state["frozen_by"]
        for index, (window, length) in enumerate(zip(cache.windows, state["lengths"], strict=True)):
            window.keys.data, window.values.data = tensors[f"keys.{index}"], tensors[f"values.{index}"]
            window.keys.length = window.values.length = length
        cache.pending.data, cache.pending.length = tensors["pending"], state["pending"]
        cache.pending_ids = tensors["pending_ids"]
        cache.fast = [tensors[f"fast.{index}"] for index in range(3 * cache.facts["suffix_layers"])]
        for name in cache._ids():
            ids = state[name]
            setattr(cache, name, None if ids is None else torch.tensor(ids, device=cache.pending_ids.device))
        return cache

    def _ids(self) -> dict[str, torch.Tensor | None]:
        return {"unread": self.unread, "first_ids": self.first_ids}

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
        for name in ("pending_ids", "unread", "first_ids"):
            ids = getattr(self, name)
            setattr(self, name, None if ids is None else change(ids))
        self.fast = [change(weight) for weight in self.fast]

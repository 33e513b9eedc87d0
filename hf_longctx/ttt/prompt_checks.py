"""What `generate()` of a TTT model cannot take, refused by name, and what it leaves in a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .fast_cache import TTTCache
from .forward_checks import validate_batch, validate_mask, validate_shapes


# A prompt that begins with this many first tokens of a memory, and is no shorter, holds all of it again.
_LEAST_FIRST_TOKENS = 4


@dataclass(frozen=True)
class Options:
    """The settings of one `generate()`: arguments before a configuration that was given, before the model's own."""

    given: Mapping[str, Any]
    own: Any

    def get(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        configs = (self.given.get("generation_config"), self.own)
        return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)

    def tokens(self, name: str) -> list[int]:
        """Ids of a special token."""
        value = self.get(name)
        value = value.tolist() if isinstance(value, torch.Tensor) else value
        return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]

    @property
    def times(self) -> int:
        """Rows that are written for each prompt."""
        return max(self.get("num_beams") or 1, self.get("num_return_sequences") or 1)


def validate_options(options: Options) -> None:
    """Raise `NotImplementedError` for ways of generating that fast weights cannot follow."""
    value = options.get("prefill_chunk_size")
    if value is not None:
        raise NotImplementedError(
            f"`prefill_chunk_size` ({value!r}) cuts prompts, and a TTT model reads them in chunks of its own "
            "anyway: leave it out."
        )
    value = options.get("cache_implementation")
    if value not in (None, "hybrid"):  # transformers ignores the latter itself
        raise NotImplementedError(
            f"`cache_implementation` ({value!r}) has no place for fast weights: leave it out; a `TTTCache` "
            "has one size anyway."
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if options.get(name):
            raise NotImplementedError(
                f"assisted decoding (`{name}`) takes back tokens, and a step that learned from them cannot be "
                "taken back: leave it out."
            )
    value = options.get("guidance_scale")
    if value not in (None, 1):
        raise NotImplementedError(
            f"`guidance_scale` ({value!r}) reads rows of its own, which would learn whatever `learn` is and remember "
            "nothing of the cache: leave it out."
        )
    if options.get("synced_gpus"):
        raise NotImplementedError(
            "`synced_gpus` (True) goes on with forwards of no new token, and there is none to learn from: generate "
            "the same number of tokens on every process, or on one."
        )
    names = ("output_attentions", "output_hidden_states")
    validate_batch({name: options.get(name) for name in names}, 0, None)


def validate_prompts(options: Options, prompts: Any) -> None:
    """Raise for prompts that are no rows of one length, by their mask or, without one, by what pads them."""
    mask = options.get("attention_mask")
    if prompts is not None:
        validate_shapes(prompts)
    validate_mask(mask, any_side=True)
    if mask is not None and not bool(mask.all()):
        raise NotImplementedError(
            f"`attention_mask` has padding in {int((mask == 0).any(1).sum())} of {len(mask)} rows, and rows "
            "of unequal length in one `generate()` would learn from it: call it once for each length, or for each "
            "row, without padding on any side."
        )
    if mask is not None or prompts is None:
        return
    ends, begins = options.tokens("eos_token_id"), options.tokens("bos_token_id")
    pads = options.tokens("pad_token_id") or ends[:1]
    if not pads:
        return
    padded = prompts == pads[0]
    # One such token is the beginning or the end of a text, where it has that meaning, too.
    first, last = int(pads[0] in [*begins, *ends]), int(pads[0] in ends)
    wrong = padded[:, : first + 1].all(1) | padded[:, -last - 1 :].all(1)
    if not first:
        wrong = wrong | padded.any(1)
    if bool(wrong.any()) and prompts.shape[1] > 1:
        raise NotImplementedError(
            f"row {int(wrong.nonzero()[0])} of the prompts has padding (`pad_token_id` {pads[0]}), and rows of "
            "unequal length in one `generate()` would learn from it: call it once for each length, or for each row, "
            "or pass an `attention_mask` of ones if these tokens are text."
        )


def validate_sharing(cache: TTTCache, prompts: Any, options: Options) -> None:
    """Raise for several continuations of one memory, which would all change it, and for a prompt that it knows."""
    times = options.times
    rows = None if prompts is None else len(prompts)
    if rows is None or cache.rows is None:
        return
    if cache.rows != rows * times:
        raise ValueError(
            f"the cache holds {cache.rows} rows, but {rows} prompts with {times} continuations each are "
            f"{rows * times}, and every one learns by itself: pass "
            f"`cache=memory.repeat({max(rows * times // cache.rows, 1)})`."
        )
    first = cache.first_ids
    if first is None or first.shape[1] < _LEAST_FIRST_TOKENS or prompts.shape[1] < cache.known:
        return
    if torch.equal(prompts[:, : first.shape[1]].repeat_interleave(times, 0).to(first), first):
        raise ValueError(
            f"the prompts ({prompts.shape[1]} tokens) begin with the {first.shape[1]} tokens that the cache read "
            f"first, so the {cache.known} that it knows would be read again: pass what comes after them only, or use "
            "`model.read(ids, cache)` to read a text twice."
        )


def leave_written(cache: TTTCache, written: torch.Tensor, read_before: int, begin: int, options: Options) -> None:
    """Note in a cache what of `(B, t)` tokens it has not read, or why nothing can follow.

    Args:
        cache ([`TTTCache`]): of this `generate()`.
        written (`torch.Tensor`): what it returned, prompts included.
        read_before (`int`): tokens that the cache knew before the prompts.
        begin (`int`): where prompts end.
        options ([`Options`]).
    """
    beams = options.get("num_beams") or 1
    if beams > 1:
        cache.damage = f"`num_beams` ({beams}) left beams in it which are not the rows that `generate()` returned"
        return
    unread = written[:, cache.seen - read_before :]
    cache.unread = unread.clone() if unread.shape[1] else None
    ends, pads = options.tokens("eos_token_id"), options.tokens("pad_token_id")
    pads = pads or ends
    if not ends or len(written) == 1:
        return
    early = torch.isin(written[:, begin:-1], written.new_tensor(ends)).any(1)
    stops = options.get("stopping_criteria") or options.get("stop_strings")
    if pads and (stops or pads[0] not in ends):  # padding after another end, as `stop_strings`
        early = early | (written[:, -1] == pads[0])
    if bool(early.any()):
        rows = early.nonzero().flatten().tolist()
        cache.damage = f"its rows {rows} ended before others in one `generate()` and read padding after that"

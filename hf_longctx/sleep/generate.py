"""`sleep_generate`: transformers' `generate` for a model that sleeps, through its own hook.

Full windows of the prompt sleep; the rest of it and the output are read in a single pass, one token at a time, and
their keys and values are dropped at each border of windows. So keys stay within the window at any length, and a token
costs the same after any prompt and with any number of passes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..adapters.peft_kinds import check_peft
from ..attention.cache_names import CACHE_NAMES, OUTPUT_NAME
from ..config.sleep import SleepConfig
from .batch_checks import check_rows
from .cache import SleepCache
from .loss import warn_other_passes
from .sleepers import PEFT_WAY, check_sleeper
from .window_passes import Sleeper, Window, forget, read_window, sleep_window


class Dreamer:
    """Rows that are read on, token by token or many at once, and forget at every border of windows.

    Args:
        sleeper ([`Sleeper`]): the parts of the model.
        config ([`SleepConfig`]): the window and its passes.
        arguments (`dict`, *optional*): what else the model's layers get.
    """

    def __init__(self, sleeper: Sleeper, config: SleepConfig, arguments: dict[str, Any] | None = None) -> None:
        self.sleeper, self.config, self.arguments = sleeper, config, arguments or {}
        self.cache = SleepCache(sleeper.model.config)
        self._start, self._border = 0, self.cache
        self._read: list[torch.Tensor] = []  # tokens of the open window, where it may have to sleep
        self._ended: tuple[SleepCache, Window] | None = None  # a window that an answer filled, and what was before it

    def read_prompt(self, tokens: torch.Tensor) -> torch.Tensor:
        """Sleep over the full windows, read the rest; logits of the last token, `(B, V)`."""
        assert self.config.window is not None
        logits, length = None, self.config.window
        while tokens.shape[1] - self._start >= length:
            window = self._window(tokens[:, self._start : self._start + length])
            ends = self._start + length == tokens.shape[1]
            logits, behind = sleep_window(self.sleeper, self.cache, window, self.config, num_logits=int(ends))
            self._begin_window(behind)
        if self._start < tokens.shape[1]:
            logits = self.read(tokens[:, self._start :])
        assert logits is not None
        return logits[:, -1] if logits.dim() == 3 else logits

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read tokens of one window in a single pass; logits of the last, `(B, V)`."""
        done = sum(piece.shape[1] for piece in self._read)
        window = self._window(tokens, done)
        if self.config.eviction == "sliding" and tokens.shape[1] == 1:
            assert self.config.window is not None
            self.cache.keep_keys(self.config.window - 1)
        logits, self.cache = read_window(self.sleeper, self.cache, window, self.config, num_logits=1)
        self._read.append(tokens)
        if done + tokens.shape[1] == self.config.window:
            self._end_window()
        assert logits is not None
        return logits[:, -1]

    def _end_window(self) -> None:
        behind = self.cache
        if self.config.answers_sleep and self.config.passes > 1:
            # Later, and only if there is a next token: the last window of an output need not sleep.
            self._ended = (self._border, self._window(torch.cat(self._read, dim=1)))
        self._begin_window(behind)

    def wake(self) -> None:
        """In front of a token: the window that an answer has filled sleeps first, where answers do."""
        ended, self._ended = self._ended, None
        if ended is not None:
            _, behind = sleep_window(self.sleeper, ended[0], ended[1], self.config)
            self.cache = self._border = forget(behind, self.config)

    def _begin_window(self, behind: SleepCache) -> None:
        assert self.config.window is not None
        self.cache = self._border = forget(behind, self.config)
        self._start += self.config.window
        self._read = []

    def _window(self, tokens: torch.Tensor, after: int = 0) -> Window:
        return Window(tokens, self._start + after, self.arguments)


def sleep_generate(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    sleep: SleepConfig | None = None,
    synced_gpus: bool = False,
    streamer=None,
    **model_kwargs,
):
    """`model.generate(ids, custom_generate=sleep_generate, sleep=SleepConfig(window=2048, passes=4))`.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs:
            as transformers hands them to a `custom_generate`.
        sleep ([`SleepConfig`]): the window and its passes.

    Returns:
        `torch.LongTensor` or `GenerateDecoderOnlyOutput`: as `generate` does; its cache is a `SleepCache`.

    Raises:
        ValueError: `sleep` is missing, or rows are padded on the left.
        NotImplementedError: beam search, assisted decoding, a streamer, or another cache than the dynamic one.

    Relations: scores of greedy decoding are those of one [`sleep_loss`] over prompt and output whose labels are the
    output. Numbers that a window of the output gives are those of a single pass, unless `answers_sleep` is set.
    Memory: keys and values of `window` tokens a layer, and the recurrent states, at any length.
    """
    _check_mode(sleep, generation_config, synced_gpus, streamer, model_kwargs)
    assert sleep is not None
    # PEFT's `generate` puts its own preparation of inputs on the model, and only there is its adapter seen.
    check_peft(getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None), *PEFT_WAY)
    sleeper = check_sleeper(model, sleep)
    check_rows(input_ids, model_kwargs)
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(mask[:, : input_ids.shape[1]].all()):
        raise ValueError("prompts are padded, and their padding would stand in a window: pass prompts of one length.")
    warn_other_passes(sleeper.model, sleep)
    dreamer = Dreamer(sleeper, sleep, _arguments(model_kwargs))
    scores: tuple[torch.Tensor, ...] = ()
    raw: tuple[torch.Tensor, ...] = ()
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    pad, ends = generation_config._pad_token_tensor, any(hasattr(stop, "eos_token_id") for stop in stopping_criteria)
    wants = generation_config.return_dict_in_generate
    logits = dreamer.read_prompt(input_ids)
    while True:
        logits = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scored = logits_processor(input_ids, logits)
        scores += (scored,) if wants and generation_config.output_scores else ()
        raw += (logits,) if wants and generation_config.output_logits else ()
        if generation_config.do_sample:
            tokens = torch.multinomial(scored.softmax(dim=-1), num_samples=1)[:, 0]
        else:
            tokens = scored.argmax(dim=-1)
        if ends:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
        if not bool(unfinished.any()):
            break
        dreamer.wake()
        logits = dreamer.read(tokens[:, None])
    if not wants:
        return input_ids
    held = {OUTPUT_NAME: dreamer.cache}
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=scores if generation_config.output_scores else None,
        logits=raw if generation_config.output_logits else None,
        **held,
    )


def _check_mode(sleep, generation_config, synced_gpus, streamer, model_kwargs) -> None:
    if not isinstance(sleep, SleepConfig) or sleep.window is None:
        raise ValueError(
            f"`sleep` ({sleep!r}) must say how to sleep: pass `sleep=SleepConfig(window=..., passes=...)` to "
            "`generate`."
        )
    if generation_config.num_beams != 1:
        raise NotImplementedError(
            f"`num_beams` ({generation_config.num_beams}) reorders states between beams, which has not been shown to "
            "be right for windows that sleep: use 1."
        )
    called = _arguments_of_generate()
    assistant = called.get("assistant_model") is not None
    if (
        assistant
        or generation_config.prompt_lookup_num_tokens
        or getattr(generation_config, "assistant_early_exit", 0)
    ):
        raise NotImplementedError(
            "assisted decoding takes tokens back, and a window that slept cannot be: leave `assistant_model` and "
            "`prompt_lookup_num_tokens` out."
        )
    for name, off in (("guidance_scale", (None, 1)), ("penalty_alpha", (None, 0)), ("dola_layers", (None,))):
        value = getattr(generation_config, name, None)
        if value not in off:
            raise NotImplementedError(
                f"`{name}` ({value!r}) reads a row in another way than window by window, and would do so "
                "without sleep or not at all: leave it out."
            )
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("`generate` was given `inputs_embeds`, and windows are cut from tokens: pass `input_ids`.")
    if streamer is not None or called.get("streamer") is not None:
        raise NotImplementedError(
            "transformers does not hand `streamer` to a `custom_generate`, so it would never end: leave it out."
        )
    if generation_config.use_cache is False or model_kwargs.get("use_cache") is False:
        raise ValueError("`use_cache` (False) leaves nowhere to put the states of a window: leave it out.")
    if generation_config.output_hidden_states or generation_config.output_attentions:
        raise NotImplementedError(
            "`output_hidden_states` and `output_attentions` are those of one pass, and a window has several: leave "
            "them out."
        )
    if synced_gpus or called.get("synced_gpus"):
        raise NotImplementedError("`synced_gpus` (True) is for sharded weights, which N passes were not proven with.")
    _check_cache(generation_config, model_kwargs)


def _check_cache(generation_config, model_kwargs) -> None:
    if generation_config.cache_implementation not in (None, "dynamic"):
        raise NotImplementedError(
            f"`cache_implementation` ({generation_config.cache_implementation!r}) is static, quantized or offloaded, "
            "and states of a window are assigned in a dynamic one: leave it out."
        )
    for name in CACHE_NAMES:
        cache = model_kwargs.get(name)
        if cache is not None and (type(cache).__name__ != "DynamicCache" or cache.offloading or _is_used(cache)):
            raise NotImplementedError(
                f"`{name}` (a `{type(cache).__name__}`) was made or filled outside: a row sleeps from its first "
                "token, in a cache of its own; leave it out."
            )


def _is_used(cache) -> bool:
    holds = [layer.keys is not None for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return any(holds) or any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers)


def _arguments_of_generate() -> dict[str, Any]:
    """What the user gave `generate`: it keeps some arguments to itself, and a mode that is not run must be refused."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and "assistant_model" in frame.f_locals:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def _arguments(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What goes on to the model's layers, such as a chunk size."""
    own = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHE_NAMES}
    others = {name: value for name, value in model_kwargs.items() if name not in own and value is not None}
    for name, value in others.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            raise ValueError(f"`{name}` would have to be cut into windows, which sleep cannot: leave it out.")
    return others

"""Rows cut into windows: those without labels sleep, those with labels are read in a single pass.

A label belongs to the window that it stands in, and is predicted by the token before it. The label of a window's first
token is therefore predicted by the last pass over the window before, awake or asleep. Rows do not know of each other:
where some sleep and others do not, each kind runs on its own part of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..config.sleep import SleepConfig
from .cache import SleepCache
from .window_passes import Sleeper, Window, forget, read_window, sleep_window


@dataclass(frozen=True)
class ReadWindow:
    """What one window of a batch gave.

    Args:
        start (`int`): position of the first token that has logits.
        logits (`torch.Tensor` of shape `(b, n, V)`): of some rows.
        rows (`torch.Tensor` of shape `(b,)`): which.
    """

    start: int
    logits: torch.Tensor
    rows: torch.Tensor


def windows_asleep(labels: torch.Tensor, config: SleepConfig, asked: torch.Tensor | None = None) -> torch.Tensor:
    """Which windows of which rows sleep: `(B, n)`, true for the full ones without a label.

    Args:
        labels (`torch.Tensor` of shape `(B, T)`): -100 where there is none.
        asked (`torch.Tensor` of shape `(B, n)`, *optional*): what the batch asks for instead.

    Raises:
        ValueError: a window that is asked to sleep has a label, or is not full; or the shape is another.
    """
    assert config.window is not None
    rows, num_tokens = labels.shape
    num_full = num_tokens // config.window
    num_windows = -(-num_tokens // config.window)
    has_label = torch.zeros(rows, num_windows, dtype=torch.bool, device=labels.device)
    full = labels[:, : num_full * config.window].reshape(rows, num_full, config.window)
    has_label[:, :num_full] = (full != -100).any(-1)
    asleep = ~has_label
    asleep[:, num_full:] = False
    if asked is None:
        return asleep
    try:
        asked = torch.as_tensor(asked, device=labels.device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`sleep_windows` ({asked!r}) must say True or False for each window of each row.") from error
    if not bool(((asked == 0) | (asked == 1)).all()):
        raise ValueError("`sleep_windows` must say True or False for each window of each row, and has other numbers.")
    asked = asked.bool()
    if asked.shape != asleep.shape:
        raise ValueError(
            f"`sleep_windows` {tuple(asked.shape)} must have one entry for each window of each row, "
            f"{tuple(asleep.shape)}."
        )
    wrong = (asked & ~asleep).nonzero()
    if len(wrong):
        row, window = wrong[0].tolist()
        why = "has labels, which are read in a single pass" if window < num_full else "is not full"
        raise ValueError(f"row {row} is asked to sleep over window {window}, which {why}: leave it awake.")
    return asked


def read_rows(
    sleeper: Sleeper,
    tokens: torch.Tensor,
    asleep: torch.Tensor,
    config: SleepConfig,
    arguments: dict[str, Any],
    wanted: torch.Tensor | None = None,
    cache: SleepCache | None = None,
) -> Iterator[ReadWindow]:
    """Run rows window by window.

    Args:
        tokens (`torch.Tensor` of shape `(B, T)`): token ids.
        asleep (`torch.Tensor` of shape `(B, n)`): see [`windows_asleep`].
        arguments (`dict`): what else the model's layers get.
        wanted (`torch.Tensor` of shape `(B, T)`, *optional*): whose logits are needed; none of a window: it has none.
        cache ([`SleepCache`], *optional*): an empty one, to read its peak.

    Yields:
        [`ReadWindow`]: of each window and kind of row that has logits.
    """
    assert config.window is not None
    length = config.window
    cache = SleepCache(sleeper.model.config) if cache is None else cache
    for index in range(asleep.shape[1]):
        start = index * length
        stop = min(start + length, tokens.shape[1])
        parts = []
        for sleeps in (True, False):
            rows = (asleep[:, index] == sleeps).nonzero()[:, 0]
            if not len(rows):
                continue
            everyone = len(rows) == len(tokens)
            own = cache if everyone else cache.select(rows)
            window = Window(tokens[rows, start:stop], start, arguments)
            needs = wanted is None or bool(wanted[rows, start:stop].any())
            if sleeps:
                last = int(wanted is not None and bool(wanted[rows, stop - 1].any()))
                logits, own = sleep_window(sleeper, own, window, config, num_logits=last)
                first = stop - 1
            else:
                logits, own = _awake(sleeper, own, window, config, needs, is_last=stop == tokens.shape[1])
                first = start
            if logits is not None:
                yield ReadWindow(first, logits, rows)
            parts.append((rows, forget(own, config) if stop - start == length else own))
        cache = parts[0][1] if len(parts) == 1 else SleepCache.joined(parts)


def _awake(
    sleeper: Sleeper, cache: SleepCache, window: Window, config: SleepConfig, needs: bool, is_last: bool
) -> tuple[torch.Tensor | None, SleepCache]:
    """One pass; where answers sleep too, the window then sleeps from where it began."""
    logits, behind = read_window(sleeper, cache, window, config, num_logits=None if needs else 0)
    is_full = window.tokens.shape[1] == config.window
    if config.answers_sleep and config.passes > 1 and is_full and not is_last:
        _, behind = sleep_window(sleeper, cache, window, config)
    return logits, behind

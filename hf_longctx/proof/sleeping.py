"""Proof that a model sleeps exactly: one process, a tiny model, and what transformers itself computes beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from transformers import DynamicCache

from ..attention.cache_names import OUTPUT_NAME
from ..config.sleep import SleepConfig
from ..sleep.generate import sleep_generate
from ..sleep.loss import forward_rows, sleep_loss
from ..sleep.sleepers import check_sleeper
from ..tiny_check import random_tokens
from .build import build_model
from .model_under_test import ModelUnderTest, read_config
from .outcomes import first_line
from .result import EXACT, EXIT_CODES, REFUSED, UNBUILDABLE, WRONG


_WINDOW, _TOKENS, _LABELLED = 16, 52, 10


@dataclass(frozen=True)
class SleepResult:
    """What [`verify_sleep`] found. True in a condition exactly if the model sleeps exactly.

    Args:
        model (`str`): model type.
        outcome (`str`): exact, wrong, refused or unbuildable.
        message (`str`): why, unless exact.
        errors (`dict[str, float]`): what was compared, and by how much it differs.
        allowed (`dict[str, float]`): by how much it may.
    """

    model: str
    outcome: str
    message: str
    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def exit_code(self) -> int:
        """0 exact, 1 wrong, 2 refused, 3 could not be built."""
        return EXIT_CODES[self.outcome]

    def __bool__(self) -> bool:
        return self.outcome == EXACT

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self) | {"exit_code": self.exit_code}


def verify_sleep(model: str, passes: int = 3) -> SleepResult:
    """Prove, on a tiny random model of this kind, that it sleeps exactly.

    Args:
        model (`str`): hub id, folder or model type.
        passes (`int`, *optional*, defaults to 3): of a window, where there is more than one.

    Returns:
        [`SleepResult`]: with `passes` 1, rows of one window and of several against transformers' own forward and
        cache, to the bit; that a gradient reaches a forgotten window; rows against themselves alone; and generation,
        token by token, against one forward.

    Raises:
        ValueError: `model` cannot be found.
    """
    config = read_config(model)
    tested = ModelUnderTest.of(config, "causal-lm", 1)
    if tested.config is None:
        return SleepResult(tested.name, UNBUILDABLE, tested.problem, {}, {})
    try:
        built = build_model(tested, None, torch.float32).eval()
    except (ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        return SleepResult(tested.name, UNBUILDABLE, first_line(error), {}, {})
    sleeps = SleepConfig(window=_WINDOW, passes=passes)
    try:
        check_sleeper(built, sleeps)
    except (ValueError, NotImplementedError) as error:
        return SleepResult(tested.name, REFUSED, str(error), {}, {})
    errors = _measure(built, sleeps)
    allowed = {"one window": 0.0, "windows": 0.0, "forgotten gradient": 0.0, "rows alone": 1e-4, "generation": 1e-4}
    wrong = [name for name, error in errors.items() if not error <= allowed[name]]
    message = f"{', '.join(wrong)}: not what one process gives" if wrong else ""
    return SleepResult(tested.name, WRONG if wrong else EXACT, message, errors, allowed)


def check_tiny(config, wanted: SleepConfig) -> None:
    """Try a tiny model of a configuration, where what it computes tells more than what it says.

    Raises:
        ValueError, NotImplementedError: it cannot sleep; see [`check_sleeper`][hf_longctx.sleep.sleepers].
    """
    tested = ModelUnderTest.of(config, "causal-lm", 1)
    if tested.config is None:
        raise ValueError(f"no tiny model can be made of it to try ({tested.problem}).")
    window = max(wanted.window or _WINDOW, _WINDOW)
    check_sleeper(build_model(tested, None, torch.float32), SleepConfig(window=window))


def _measure(model, config: SleepConfig) -> dict[str, float]:
    ids = random_tokens(model.config.get_text_config().vocab_size, 2, _TOKENS)
    labels = ids.clone()
    labels[:, :-_LABELLED] = -100
    batch = {"input_ids": ids, "labels": labels}
    once = SleepConfig(window=config.window)
    whole = SleepConfig(window=2 * _TOKENS)
    with torch.no_grad():
        errors = {"one window": _off(sleep_loss(model, batch, whole), model(**batch, use_cache=False).loss)}
        awake = _TOKENS // _WINDOW * _WINDOW
        errors["windows"] = _off(_logits(model, batch, once)[:, awake:], _own_cache(model, ids)[:, awake:])
    table = model.get_input_embeddings().weight
    early = ids[:, :_WINDOW].unique()
    only = early[~torch.isin(early, ids[:, _WINDOW:])]
    sleep_loss(model, batch, config).backward()
    reached = len(only) == 0 or bool(table.grad[only].abs().max() > 0)
    errors["forgotten gradient"] = 0.0 if reached else float("inf")
    model.zero_grad()
    with torch.no_grad():
        together = _logits(model, batch, config)
        alone = [
            _logits(model, {name: value[row : row + 1] for name, value in batch.items()}, config) for row in (0, 1)
        ]
        errors["rows alone"] = _off(torch.cat(alone), together)
    errors["generation"] = _generated(model, ids[:, : _WINDOW + 5], config)
    return errors


def _generated(model, prompt: torch.Tensor, config: SleepConfig) -> float:
    made = model.generate(
        prompt,
        custom_generate=sleep_generate,
        sleep=config,
        max_new_tokens=_WINDOW + 4,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    labels = made.sequences.clone()
    labels[:, : prompt.shape[1]] = -100
    with torch.no_grad():
        forced = _logits(model, {"input_ids": made.sequences, "labels": labels}, config)
    return _off(torch.stack(made.logits, dim=1), forced[:, prompt.shape[1] - 1 : -1])


def _logits(model, batch: dict[str, torch.Tensor], config: SleepConfig) -> torch.Tensor:
    logits = forward_rows(check_sleeper(model, config), batch, config, keeps_logits=True)[0].logits
    assert logits is not None
    return logits


def _own_cache(model, ids: torch.Tensor) -> torch.Tensor:
    """Transformers' model with transformers' cache, whose keys are dropped at each border of windows."""
    cache, logits = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1], _WINDOW):
        stop = min(start + _WINDOW, ids.shape[1])
        positions = torch.arange(start, stop)[None]
        inputs = {"input_ids": ids[:, start:stop], "position_ids": positions, "use_cache": True, OUTPUT_NAME: cache}
        logits.append(model(**inputs).logits)
        for layer in cache.layers:
            if hasattr(layer, "keys"):
                layer.keys = layer.values = None
                layer.is_initialized = False
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length = 0
    return torch.cat(logits, dim=1)


def _off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))

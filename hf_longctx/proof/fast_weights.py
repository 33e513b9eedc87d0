"""`verify_fast_weights`: a tiny model of a type with fast weights, proven in one process, row by row of a short list.

transformers' norms and softmax cast to float32 inside, where finite differences say nothing. Every such cast is to
float64 instead while the proof runs.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from ..attention.cache_names import OUTPUT_NAME
from ..config.test_time import TTTConfig
from ..tiny_check import random_tokens
from ..ttt.fast_model import TTTForCausalLM
from .build import build_model
from .model_under_test import ModelUnderTest, read_config
from .result import EXACT, REFUSED, UNBUILDABLE, WRONG


_WINDOW, _CHUNK, _TOKENS, _ROWS = 8, 6, 29, 2
_STEP, _LEAST_SLOPE = 4e-6, 1e-3  # between the curvature of steep losses and the rounding of flat ones


@dataclass(frozen=True)
class FastWeightsCheck:
    """One row of the proof: the worst error found, and what is allowed."""

    name: str
    error: float
    allowed: float
    detail: str = ""

    @property
    def is_exact(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class FastWeightsResult:
    """The proof of a type: true in a condition if every row is exact."""

    model: str
    outcome: str
    message: str
    checks: tuple[FastWeightsCheck, ...] = ()
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return self.outcome == EXACT


class InFloat64(TorchFunctionMode):
    """Casts to float32 are to float64 while it is on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def verify_fast_weights(model: str | PretrainedConfig) -> FastWeightsResult:
    """Prove fast weights in a tiny model of a type.

    Args:
        model (`str` or `PretrainedConfig`): as [`verify`] takes it.

    Returns:
        [`FastWeightsResult`]: `"refused"` where the type is not laid out as Llama is.

    Raises:
        ValueError: no such model.
    """
    began = time.perf_counter()
    config = read_config(model) if isinstance(model, str) else model
    tested = ModelUnderTest.of(config, None, 2)
    if tested.config is None:
        return FastWeightsResult(tested.name, UNBUILDABLE, tested.problem)
    try:
        base = build_model(tested, "eager", torch.float64).eval()
        own = getattr(base.config, "sliding_window", None) or _WINDOW
        window = min(own, _WINDOW)
        settings = TTTConfig(
            window=window,
            chunk_tokens=min(window, _CHUNK),
            suffix_layers=max(1, base.config.get_text_config().num_hidden_layers - 1),
            fast_intermediate_size=16,
        )
        model, ids = TTTForCausalLM.from_base(copy.deepcopy(base), settings), _rows(base)
        with InFloat64():
            checks = tuple(_checks(model, base, ids))
        checks += (_check_recomputation(model, ids),)
    except NotImplementedError as error:
        return FastWeightsResult(tested.name, REFUSED, str(error), seconds=time.perf_counter() - began)
    except (ValueError, ImportError) as error:
        return FastWeightsResult(tested.name, UNBUILDABLE, str(error), seconds=time.perf_counter() - began)
    wrong = [check for check in checks if not check.is_exact]
    message = f"{wrong[0].name}: {wrong[0].error:.1e} {wrong[0].detail}".strip() if wrong else ""
    outcome = WRONG if wrong else EXACT
    return FastWeightsResult(tested.name, outcome, message, checks, time.perf_counter() - began)


def _rows(base: Any) -> torch.Tensor:
    return random_tokens(base.config.get_text_config().vocab_size, _ROWS, _TOKENS)


def _checks(model: Any, base: Any, ids: torch.Tensor) -> Iterator[FastWeightsCheck]:
    mask = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool).tril().triu(1 - model.settings.window)
    mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    with torch.no_grad():
        model.eval()
        windowed = base(ids, attention_mask=mask.expand(_ROWS, 1, -1, -1), use_cache=False).logits
        model.set_attn_implementation("packed")
        error = (model(ids, learn=False).logits - windowed).abs().max()
        yield FastWeightsCheck("without steps it is the base with a window", float(error), 1e-9)
        for matrix in model.primes.matrices():
            matrix.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        expected = model(ids).logits
        yield FastWeightsCheck("a later token changes nothing before it", _leak(model, ids, expected), 0.0)
        alone = torch.cat([model(row[None]).logits for row in ids])
        yield FastWeightsCheck("rows learn by themselves", float((alone - expected).abs().max()), 1e-9)
        cache = model.make_cache()
        pieces = [model(piece, **{OUTPUT_NAME: cache}).logits for piece in ids.split([7, 1, 1, 1, 19], 1)]
        error = (torch.cat(pieces, 1) - expected).abs().max()
        yield FastWeightsCheck("reading in pieces is one forward", float(error), 1e-9)
        evaluated = model(ids, labels=ids).loss
    loss, gradients = _step(model, ids)
    yield FastWeightsCheck("evaluation is the training forward", float(abs(loss - evaluated)), 1e-9)
    error, name = _finite_differences(model, ids, gradients)
    yield FastWeightsCheck("the gradient through all steps is that of finite differences", error, 1e-6, f"of `{name}`")
    # The angles of a loaded model are computed anew, here in float64.
    yield FastWeightsCheck("a saved model is the same", _reload(model.eval(), ids, expected), 1e-5)


def _check_recomputation(model: Any, ids: torch.Tensor) -> FastWeightsCheck:
    """With transformers' own casts, since a backward that runs layers again knows no others."""
    loss, gradients = _step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, others = _step(model, ids)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    error = max(float((others[name] - gradient).abs().max()) / largest for name, gradient in gradients.items())
    return FastWeightsCheck("recomputation changes nothing", max(error, float(abs(again - loss))), 1e-5)


def _leak(model: Any, ids: torch.Tensor, expected: torch.Tensor) -> float:
    changed = ids.clone()
    changed[:, -9] = changed[:, -10]
    return float((model(changed).logits[:, : _TOKENS - 9] - expected[:, : _TOKENS - 9]).abs().max())


def _step(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@torch.no_grad()
def _finite_differences(model: Any, ids: torch.Tensor, gradients: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The worst relative error of any parameter's gradient, in a direction of its own."""
    generator, worst = torch.Generator().manual_seed(2), (0.0, "")
    model.eval()
    unused = [parameter for name, parameter in model.named_parameters() if name not in gradients]
    groups = [(name, [parameter]) for name, parameter in model.named_parameters() if name in gradients]
    for name, parameters in [*groups, ("parameters without a gradient", unused)]:
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        directions = [direction / direction.norm() for direction in directions]
        exact = torch.zeros((), dtype=torch.float64)
        if name in gradients and float(gradients[name].norm()):
            directions[0] += gradients[name] / gradients[name].norm()
            exact = (directions[0] * gradients[name]).sum()
        sides = []
        for sign in (1, -1):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * _STEP)
            sides.append(model(ids, labels=ids).loss)
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=sign * _STEP)
        slope = (sides[0] - sides[1]) / (2 * _STEP)
        worst = max(worst, (float(abs(slope - exact) / max(abs(exact), _LEAST_SLOPE)), name))
    return worst


def _reload(model: Any, ids: torch.Tensor, expected: torch.Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = TTTForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        return float((loaded(ids).logits - expected).abs().max())

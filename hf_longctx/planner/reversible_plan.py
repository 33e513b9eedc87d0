"""What reversible layers hold, from the plan of the same model with activation checkpointing.

Both run every layer once more in backward and hold what one layer needs while it runs. They differ in what stays:
checkpointing keeps one tensor a layer, reversible layers two streams in float64, and two gradients of these in
backward. All gradients of the stack arrive together at its end, beside those of earlier micro-batches.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from .settings import Settings
from .simulate import PhasePeaks, dtype_in_compute


_FLOAT64 = 8
# One half-layer runs at a time, so what the other one holds is not there.
_OTHER_HALF = {"attention": "mlp", "mlp": "attention"}


def reversible_peaks(
    peaks: PhasePeaks, settings: Settings, num_layers: int, table: torch.nn.Parameter, trained: int
) -> PhasePeaks:
    """The peaks of two streams, from those of checkpoints at the same tokens.

    Args:
        peaks ([`PhasePeaks`]): of the whole model with activation checkpointing.
        settings ([`Settings`]): of the run.
        num_layers (`int`): of the model.
        table (`torch.nn.Parameter`): the input embedding, of which tokens have their width and precision.
        trained (`int`): numbers in the trained parameters of all layers.
    """
    numbers = settings.rows * settings.local_tokens * table.shape[1]
    checkpoint, stream = numbers * dtype_in_compute(settings, table).itemsize, numbers * _FLOAT64
    device = {}
    for phase, kinds in peaks.device.items():
        part, _, place = phase[0].partition(" ")
        index = int(place) % num_layers if place else num_layers - 1
        kept = {"forward": index + 1, "loss": num_layers, "backward": index + 1}.get(part, 0)
        streams = {"forward": 2, "loss": 2, "backward": 4, "end": 4}.get(part, 0)
        hidden = max(0.0, kinds["hidden"] - kept * checkpoint) + streams * stream
        again = settings.weights_dtype.itemsize * trained if settings.accumulates and part == "backward" else 0
        done = _OTHER_HALF.get(phase[1]) if part == "backward" else None
        freed = {done: 0.0} if done else {}
        device[phase] = {**kinds, **freed, "hidden": hidden, "workspace": kinds["workspace"] + again}
    return PhasePeaks(device, 0.0, 0.0)


@dataclass(frozen=True)
class DeepestStack:
    """How many reversible layers of one width fit.

    Args:
        width (`int`): numbers of a token, `D`.
        num_layers (`int`): the most layers; 0 if not even one fits.
        parameters (`int`): numbers in the weights of that model.
        device (`int`): bytes of one device at the peak of a step.
    """

    width: int
    num_layers: int
    parameters: int
    device: int


def deepest_stack(config: PretrainedConfig, width: int, settings: Settings, device_bytes: int) -> DeepestStack:
    """The deepest model of a width whose rows of `settings.tokens` fit a device.

    Args:
        config (`PretrainedConfig`): of a causal language model; its other sizes grow with its width.
        width (`int`): numbers of a token.
        settings ([`Settings`]): of the run, with `reversible` or not.
        device_bytes (`int`): of one device.
    """
    from .memory_plan import USABLE_SHARE, Planner

    few, more = (Planner(_resized(config, width, layers)) for layers in (4, 8))
    here, there = (planner.breakdown(settings).device for planner in (few, more))
    each = (there - here) / 4
    layers = int(4 + (device_bytes * USABLE_SHARE - here) / each)
    sizes = [sum(p.numel() for p in planner.model.parameters()) for planner in (few, more)]
    if layers < 1:
        return DeepestStack(width, 0, 0, round(here - 3 * each))
    parameters = sizes[0] + (sizes[1] - sizes[0]) // 4 * (layers - 4)
    return DeepestStack(width, layers, parameters, round(here + each * (layers - 4)))


def _resized(config: PretrainedConfig, width: int, num_layers: int) -> Any:
    resized: Any = copy.deepcopy(config.get_text_config())
    times = width / resized.hidden_size
    heads, groups = resized.num_attention_heads, getattr(resized, "num_key_value_heads", None)
    resized.num_attention_heads = max(1, round(heads * times))
    if groups:
        resized.num_key_value_heads = max(1, resized.num_attention_heads * groups // heads)
    for name in ("intermediate_size", "n_inner"):
        if getattr(resized, name, None):
            setattr(resized, name, round(getattr(resized, name) * times))
    resized.hidden_size, resized.num_hidden_layers = width, num_layers
    if getattr(resized, "layer_types", None):
        resized.layer_types = (resized.layer_types * num_layers)[:num_layers]
    return resized


def reversible_settings(settings: Settings) -> Settings:
    """What is simulated for `settings`: checkpoints instead of two streams."""
    return replace(settings, reversible=False, checkpointing=True, every_n_layers=1)


def trained_numbers(layers: torch.nn.Module) -> int:
    """Of all layers."""
    return sum(p.numel() for p in layers.parameters() if p.requires_grad)

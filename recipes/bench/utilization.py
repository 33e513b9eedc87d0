"""How well a step uses the device: its FLOPs by the model's formula, the device's peak, the kernels of attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PretrainedConfig

from hf_longctx.reporting.flops import count_flops
from hf_longctx.reporting.meter import known_peak_tflops


def utilization(config: PretrainedConfig, tokens: int, step: Callable[[], None] | None) -> dict:
    """FLOPs of a step by the model's formula, in which a causal pair counts once and nothing that is run again; the
    most this device can do a second; on CUDA the kernels of attention that `step` ran, if it is given."""
    facts = {"model_flops": count_flops(config).step([tokens]).model, "peak_tflops": None}
    if torch.cuda.is_available():
        facts["peak_tflops"] = known_peak_tflops(torch.device("cuda"))
        facts["kernels"] = [] if step is None else attention_kernels(step)
    return facts


def attention_kernels(step: Callable[[], None]) -> list[str]:
    """Names of the kernels on the device whose name is that of attention, the longest-running first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
    except RuntimeError:  # some machines do not allow profiling; the step itself is measured later
        return []
    parts = ("flash", "fmha", "attention", "attn", "sdpa")
    events = [event for event in profile.key_averages() if any(part in event.key.lower() for part in parts)]
    events.sort(key=lambda event: -event.self_device_time_total)
    return [event.key[:120] for event in events[:2]]

"""What a step really takes, measured in a process of its own, to compare a plan with.

The model is built with random weights and trained for two steps; the second is measured. On a GPU the number is the
most bytes that torch's allocator had given out. On a CPU it is the largest resident set of the process less what it
held before there was a model; libraries are loaded and warm by then, and large blocks go back to the system when they
are freed.

    python -m hf_longctx.planner.measure folder_with_config settings.json
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from ..adapters.tiled_loss import tile_loss
from ..adapters.tiled_mlp import tile_mlp
from .settings import Settings
from .simulate import MAKE_OPTIMIZER, backward, enable_checkpointing


_SETTINGS_FILE = "settings.json"
# Blocks of this size and more are mapped one by one, and so are given back one by one.
_MAPPED_BYTES = 2**16
_WARM_UP = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def measure_in_process(config: PretrainedConfig, settings: Settings, device: str, timeout: float | None = None) -> int:
    """Bytes of weights, gradients, optimizer and activations at the peak of a step.

    Args:
        config (`PretrainedConfig`): of the model, with as many layers as are to be run.
        settings ([`Settings`]): of one process: no wrapper, no sequence parallelism, no adapters.
        device (`str`): `"cpu"` or `"cuda"`.
        timeout (`float`, *optional*): seconds until the process is given up.

    Raises:
        ValueError: settings that one process alone does not have.
        RuntimeError: the process failed; the message ends with its own.
    """
    if settings.wrapper != "none" or settings.sequence_parallel_size > 1 or settings.optimizer == "lora":
        raise ValueError(
            f"`wrapper` ('{settings.wrapper}'), `sequence_parallel_size` ({settings.sequence_parallel_size}) and "
            f"`optimizer` ('{settings.optimizer}') are not those of one process that trains all weights: measure "
            "without them."
        )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        values = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in asdict(settings).items()}
        Path(folder, _SETTINGS_FILE).write_text(json.dumps(values))
        command = [sys.executable, "-m", __name__, folder, device]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_MAPPED_BYTES)}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the measured step took longer than {timeout:.0f} s: measure fewer tokens.") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the measured step failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(config: PretrainedConfig, settings: Settings, device: str) -> int:
    """The same in this process, which should have done nothing else before."""
    _train(_WARM_UP, settings.of(tokens=64, loss_tile_size=None, mlp_tile_size=None, checkpointing=False), device)
    gc.collect()
    meter = _Meter(device)
    _train(config, settings, device, meter)
    return meter.most


def _train(config: PretrainedConfig, settings: Settings, device: str, meter: _Meter | None = None) -> None:
    """Two steps; `meter` looks at the second."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=settings.weights_dtype, attn_implementation="packed"
        ).train()
    if settings.checkpointing:
        choice = {"every_n_layers": settings.every_n_layers, "offload": settings.offload}
        enable_checkpointing(model, {"use_reentrant": False}, **choice)
    if settings.loss_tile_size is not None:
        tile_loss(model, settings.loss_tile_size)
    if settings.mlp_tile_size is not None:
        tile_mlp(model, settings.mlp_tile_size)
    shape = settings.rows, settings.tokens
    ids = torch.randint(config.get_text_config().vocab_size, shape, device=device)
    batch = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    optimizer = MAKE_OPTIMIZER[settings.optimizer](model.parameters())
    for step in range(2):
        if step and meter is not None:
            gc.collect()
            meter.reset()
        backward(model, batch, settings)
        optimizer.step()
        optimizer.zero_grad()
    if meter is not None:
        meter.read()


class _Meter:
    """The memory of this process on one device."""

    def __init__(self, device: str) -> None:
        self.on_gpu, self.most = device == "cuda", 0
        self.start = 0 if self.on_gpu else _status("VmRSS")

    def reset(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew

    def read(self) -> None:
        self.most = torch.cuda.max_memory_allocated() if self.on_gpu else _status("VmHWM") - self.start


def shorten(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same model with its first `num_layers` layers."""
    config, whole = copy.deepcopy(config), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = min(num_layers, whole)
    return config


def can_measure(device: str) -> bool:
    """Whether this system tells what a process takes on `device`."""
    return torch.cuda.is_available() if device == "cuda" else os.access("/proc/self/clear_refs", os.W_OK)


def free_bytes(device: str) -> int:
    """Memory that is free on this machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def resident_bytes() -> int | None:
    """What this process holds in memory now; `None` where the system does not tell."""
    return _status("VmRSS") if os.path.exists("/proc/self/status") else None


def _status(field: str) -> int:
    return _kilobytes("/proc/self/status", field)


def _kilobytes(file: str, field: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    folder, device = sys.argv[1:]
    values = json.loads(Path(folder, _SETTINGS_FILE).read_text())
    for field in fields(Settings):
        if str(values[field.name]).startswith("torch."):
            values[field.name] = getattr(torch, values[field.name].removeprefix("torch."))
    sys.stdout.write(json.dumps(measure(AutoConfig.from_pretrained(folder), Settings(**values), device)) + "\n")


if __name__ == "__main__":
    main()

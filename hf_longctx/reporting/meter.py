"""`ThroughputMeter`: tokens a second, FLOPs and memory of a run, in the trainer's own logs.

It looks at the batches as they enter the model, so that padding is left out and documents of a packed row count by
themselves, and takes the time between optimizer steps, without evaluation and saving.
Price: one gather of a few integers an optimizer step. Where documents must be read from a mask or from positions, the
CPU waits for the device once a micro-batch; a sharded batch brings them along.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from typing import Any

import torch
from accelerate.utils import gather
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..adapters.instance_forward import patches_on
from ..adapters.wrapped import unwrap
from ..parallel.segments import DOCUMENT_BOUND_KEYS, segment_rows
from ..parallel.shard import SequenceShard
from ..parallel.stopwatch import Stopwatch
from ..planner.settings import GIB
from .flops import ModelFlops, count_flops, count_products


logger = logging.getLogger(__name__)

# Dense bf16 of one device, from the makers' data sheets; the first name that is part of the device's is taken.
_PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "MI300X": 1307.0,
}


class ThroughputMeter(TrainerCallback):
    """Add speed and memory to the logs of a training run.

    Each training log gets
    - `tokens_per_second`: tokens of all processes that are not padding;
    - `achieved_tflops`: model FLOPs (10^12) a second of one device, see [`flops`][hf_longctx.reporting.flops]; left
      out, with a warning, for a model whose FLOPs are not known;
    - `mfu`: that as a share of the device's peak for dense bf16; left out where the peak is not known;
    - `exchange_share`: where rows are shared, the part of this process's time that it spent in the exchanges between
      ranks, waiting for slower ones included;
    - `peak_memory_gib`: largest memory that tensors took on any device so far, or the largest resident set of any
      process on a CPU.

    Args:
        peak_tflops (`float`, *optional*): peak of one device; known for common GPUs.

    Use [`ThroughputMeter.attach`] rather than `callbacks=[...]`: callbacks run in order, and loggers come before a
    user's.

    Communication: one gather of a few integers an optimizer step; every rank must have the callback.
    """

    def __init__(self, *, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(
                f"`peak_tflops` ({peak_tflops!r}) must be positive: it is the peak of one device in 10^12 FLOPs a "
                "second; leave it out to have it looked up."
            )
        self.peak_tflops = peak_tflops
        self.flops: ModelFlops | None = None
        self.trained_share = 1.0
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._exchange, self._shares_rows = Stopwatch(), False
        self._clock, self._seconds = 0.0, 0.0
        self._batches: list[torch.Tensor] = []  # of this step and rank: tokens, and pairs for every span
        self._steps: list[torch.Tensor] = []  # since the last log, of all ranks: the same, and bytes

    def attach(self, trainer: Trainer) -> ThroughputMeter:
        """Put this meter before every other callback of `trainer`, so that loggers see what it adds."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._forget_model()
        self._batches, self._steps = [], []
        self._exchange, self._shares_rows = Stopwatch(), False
        inside = _transformer_inside(model)
        self._learn_flops(inside or model, is_main=state.is_world_process_zero)
        if inside is None:
            self._hook = model.register_forward_pre_hook(self._see_batch, with_kwargs=True)
        else:  # sentence-transformers calls `forward` past the inner model's hooks, and rows are cut on the way to it
            self._hook = unwrap(model)[0].register_forward_hook(self._see_features)
        self._clock, self._seconds = time.perf_counter(), 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._count_time()
        numbers = torch.zeros(self._num_counts, dtype=torch.int64, device=args.device)
        for counts in self._batches:
            numbers += counts.to(numbers.device)
        memory = torch.tensor([peak_memory()], device=args.device)
        self._steps.append(gather(torch.cat([numbers, memory])[None]))
        self._batches = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is None or "loss" not in logs:
            return
        self._count_time()
        seconds, steps = self._seconds, [step.tolist() for step in self._steps]
        self._seconds, self._steps = 0.0, []
        if not steps:
            return
        ranks = [rank for step in steps for rank in step]
        num_tokens, *pairs = (sum(column) for column in list(zip(*ranks))[:-1])
        figures = {"peak_memory_gib": round(max(rank[-1] for rank in ranks) / GIB, 3)}
        exchange = self._exchange.take()
        if self._shares_rows and seconds > 0:
            figures["exchange_share"] = float(f"{exchange / seconds:.4g}")
        if num_tokens and seconds > 0:
            figures["tokens_per_second"] = round(num_tokens / seconds, 2)
            if self.flops is not None:
                total = self.flops.step_of_counts(num_tokens, pairs, trained_share=self.trained_share).model
                achieved = total / seconds / 1e12 / (args.world_size * max(args.n_gpu, 1))
                figures["achieved_tflops"] = float(f"{achieved:.4g}")
                peak = self.peak_tflops or known_peak_tflops(args.device)
                if peak is not None:
                    figures["mfu"] = float(f"{achieved / peak:.4g}")
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._clock = time.perf_counter()

    def on_save(self, args, state, control, **kwargs) -> None:
        self._clock = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._forget_model()

    @property
    def _num_counts(self) -> int:
        return 1 + (len(self.flops.attention) if self.flops is not None else 0)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._seconds, self._clock = self._seconds + now - self._clock, now

    def _forget_model(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _learn_flops(self, model: torch.nn.Module, is_main: bool) -> None:
        base = unwrap(model)
        self.flops, self.trained_share = None, 1.0
        try:
            self.flops = count_flops(base.config, type(base))
            config = base.config.get_text_config()
            trained = count_products(model, config, trained_only=True)
            self.trained_share = trained / count_products(model, config)
        except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            if is_main:  # what one model of transformers lacks, another spells in its own way: never stop a run for it
                logger.warning(f"the logs will have no `achieved_tflops`: {error}")

    def _see_features(self, module: torch.nn.Module, args: tuple, features: dict[str, object]) -> None:
        self._see_batch(module, args, features)
        self._shares_rows = False  # the shard was used before it came here, so no stopwatch was in it

    @torch.compiler.disable
    def _see_batch(self, model: torch.nn.Module, args: tuple, batch: dict[str, object]) -> tuple | None:
        if not model.training or not torch.is_grad_enabled():
            return None  # evaluation, sanity checks and generation
        lengths, shard = document_lengths(batch), batch.get("sequence_shard")
        if lengths is not None:
            lengths = lengths * (not _is_counted_elsewhere(model))
            pairs = self.flops.count_pairs(lengths) if self.flops is not None else []
            self._batches.append(torch.stack([lengths.sum(), *pairs]))
        if not isinstance(shard, SequenceShard) or shard.size == 1:
            return None
        self._shares_rows, stopwatch = True, self._exchange
        if shard.stopwatch is not None:  # another watch's, which goes on
            stopwatch = Stopwatch(also=(self._exchange, shard.stopwatch), is_on=False)
        return args, {**batch, "sequence_shard": dataclasses.replace(shard, stopwatch=stopwatch)}


def _is_counted_elsewhere(model: torch.nn.Module) -> bool:
    """Whether another rank counts these rows: a patch of the model cuts them inside, and all of a group pass them."""
    sharings = [getattr(patch, "sharing", None) for patch in patches_on(unwrap(model))]
    return any(sharing is not None and sharing.mesh.sequence_parallel_rank > 0 for sharing in sharings)


def _transformer_inside(model: torch.nn.Module) -> torch.nn.Module | None:
    """The model of transformers that a sentence-transformer, which is a sequence of modules, begins with."""
    base = unwrap(model)
    if not isinstance(base, torch.nn.Sequential):
        return None
    return next((module for module in base.modules() if isinstance(module, PreTrainedModel)), None)


def document_lengths(batch: dict[str, Any]) -> torch.Tensor | None:
    """Tokens of every document of a batch.

    Args:
        batch (`dict`): what the model is called with; full rows, or one rank's share with its `sequence_shard`.

    Returns:
        `torch.Tensor` of integers, in which zeros may stand for nothing. The first rank of a group that shares rows
        gets all their documents, the others zeros, so that a sum over ranks counts each once. `None` without tokens.
    """
    shard, tokens = batch.get("sequence_shard"), batch.get("input_ids")
    tokens = batch.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, torch.Tensor):
        return None
    rows, num_tokens = tokens.shape[:2]
    if shard is not None:
        segments, num_tokens = shard.segment_ids, shard.num_tokens
    else:
        segments = _segments(batch, rows, num_tokens, tokens.device)
    if shard is not None and shard.rank > 0:
        return torch.zeros(1, dtype=torch.int64, device=tokens.device)
    if segments is None:
        return torch.full((rows,), num_tokens, device=tokens.device)
    starts = torch.nn.functional.pad(segments.diff(dim=1) != 0, (1, 0), value=True)
    document = starts.flatten().cumsum(0) - 1
    lengths = torch.zeros(segments.numel(), dtype=torch.int64, device=segments.device)
    return lengths.scatter_add_(0, document, (segments >= 0).flatten().long())


def _segments(batch: dict[str, object], rows: int, num_tokens: int, device: torch.device) -> torch.Tensor | None:
    facts = {key: batch[key] for key in DOCUMENT_BOUND_KEYS if batch.get(key) is not None}
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        facts["attention_mask"] = mask
    if isinstance(positions, torch.Tensor) and positions.dim() == 2:
        facts["position_ids"] = positions
    try:
        return segment_rows(facts, rows, num_tokens, device)[0]
    except ValueError:  # bounds with a mask or with several rows: not for a meter to refuse
        return segment_rows({"attention_mask": facts.get("attention_mask")}, rows, num_tokens, device)[0]


def known_peak_tflops(device: torch.device) -> float | None:
    """The peak of a device in dense bf16, in 10^12 FLOPs a second, or `None` if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def cpu_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # accelerate needs it everywhere

        facts = psutil.Process().memory_info()
        return getattr(facts, "peak_wset", facts.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_memory() -> int | None:
    """The most that tensors took on this process's device so far, in bytes; `None` on a CPU."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.cuda.max_memory_allocated() if used else None


def peak_memory() -> int:
    """The largest memory so far, in bytes: of the device, or of the process on a CPU."""
    device = device_memory()
    return cpu_memory() if device is None else device

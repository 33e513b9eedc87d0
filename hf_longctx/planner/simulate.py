"""One training step of a model on tensors without memory: forward, backward, optimizer, and what was alive when.

There is no formula for any architecture. The model's own code runs, with transformers' checkpointing, our tiles and
the real optimizer; only attention is replaced by one that holds what the real kernels hold. What several processes
share (weights, gradients, optimizer state) counts with the share of one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import Adafactor

from ..adapters.pass_shard import pass_shard
from ..adapters.recurrent.layers import follow_recurrences
from ..adapters.sparse.sparse_layers import count_sparse_layers
from ..adapters.tiled_loss import tile_loss
from ..adapters.tiled_mlp import tile_mlp
from ..attention.registry import known_to_transformers
from ..losses.tiles import choose_tile_size
from .fake_attention import SHAPE_ONLY_ATTENTION, PlannedRows
from .fake_model import FakeAnswers, Stack, add_adapters, dtype_in_compute, fake_copy, fake_mode
from .layer_watch import watch_layers
from .reference_forward import reference_model, whole_rows
from .settings import Settings
from .tracker import CPU, StorageTracker


@dataclass(frozen=True)
class PhasePeaks:
    """The peak of every phase of a step.

    Args:
        device (`dict`): for each phase, bytes by kind.
        cpu (`float`): most bytes of checkpoints in CPU memory.
        num_checkpoints (`float`): how many tensors these are.
    """

    device: dict[tuple[str, str], dict[str, float]]
    cpu: float
    num_checkpoints: float

    @property
    def states(self) -> float:
        """Bytes of weights, gradients and optimizer in the phase that has most of them; no row is so short that they
        are fewer."""
        return max(
            sum(kinds[kind] for kind in ("weights", "gradients", "optimizer")) for kinds in self.device.values()
        )

    def towards(self, other: PhasePeaks, steps: float) -> PhasePeaks:
        """This and `steps` times the difference to `other`, in the phases that both have."""
        device = {
            phase: {kind: mine + (other.device[phase][kind] - mine) * steps for kind, mine in kinds.items()}
            for phase, kinds in self.device.items()
            if phase in other.device
        }
        cpu, count = (
            mine + (theirs - mine) * steps
            for mine, theirs in ((self.cpu, other.cpu), (self.num_checkpoints, other.num_checkpoints))
        )
        return PhasePeaks(device, cpu, count)


def simulate(model: torch.nn.Module, settings: Settings, stack: Stack | None, num_layers: int) -> PhasePeaks:
    """Run one step with the first `num_layers` layers of `stack`, for `settings.local_tokens` tokens.

    Args:
        model (`torch.nn.Module`): from `model_on_meta`; not changed.
        settings ([`Settings`]): of the run.
        stack ([`Stack`], *optional*): the layers of `model`; `None` if it has none that are known.
        num_layers (`int`): how many of them to run.

    Raises:
        NotImplementedError: the model cannot run on tensors without numbers.
    """
    if count_sparse_layers(model):
        raise NotImplementedError(
            f"`{type(model).__name__}` cannot be planned: what its layers gather depends on what its indexers pick, "
            "which tensors without numbers do not tell; measure a short run instead."
        )
    tile = choose_tile_size(settings.loss_tile_size, model.config.get_text_config().vocab_size)
    quiet = _unheard(FakeTensorMode.__module__), _unheard(tile_mlp.__module__)
    with known_to_transformers(SHAPE_ONLY_ATTENTION), quiet[0], quiet[1], fake_mode(), FakeAnswers(tile):
        fake = fake_copy(model, partial(dtype_in_compute, settings), stack, num_layers)
        if settings.optimizer == "lora":
            add_adapters(fake, stack, settings.lora_rank)
        follow_recurrences(fake)
        pass_shard(fake)
        tracker = StorageTracker()
        prepare(fake, settings, tracker)
        watch_layers(fake, stack, tracker)
        reference = fake if settings.reference == "adapter" else None
        if settings.reference == "model":
            reference = reference_model(model, settings, stack, num_layers, tracker)
        try:
            return run_step(fake, _batch(fake, settings), settings, tracker, reference)
        except RuntimeError as error:
            if isinstance(error, NotImplementedError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NotImplementedError(
                f"`{type(model).__name__}` cannot be planned: it does not run on tensors without numbers ({reason}); "
                "measure a short run instead."
            ) from error


def prepare(model: torch.nn.Module, settings: Settings, tracker: StorageTracker) -> None:
    """Put the settings on `model` as a trainer does."""
    model.train()
    if settings.checkpointing:
        # Random states are of some bytes, and a fake generator has none.
        kwargs: dict[str, object] = {"use_reentrant": False, "preserve_rng_state": False}
        enable_checkpointing(model, kwargs, every_n_layers=settings.every_n_layers)
        if settings.offload:
            for module in model.modules():
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = _offloading(partial(checkpoint, **kwargs), tracker)
    if settings.loss_tile_size is not None:
        tile_loss(model, settings.loss_tile_size)
    if settings.mlp_tile_size is not None:
        tile_mlp(model, settings.mlp_tile_size)


def enable_checkpointing(model: torch.nn.Module, kwargs: dict[str, object], **choice: object) -> None:
    """transformers' own checkpointing, under the name that its version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs, **choice)


@contextlib.contextmanager
def _unheard(name: str) -> Iterator[None]:
    """Within the block, the logger of that name is silent: its messages are meant for a run, not for a plan."""
    logger = logging.getLogger(name)
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def run_step(
    model: torch.nn.Module,
    batch: dict[str, object],
    settings: Settings,
    tracker: StorageTracker,
    reference: torch.nn.Module | None = None,
) -> PhasePeaks:
    """A step of a run that has gone on for a while, so that the optimizer's state is there.

    Args:
        model (`torch.nn.Module`): prepared; on fake or real tensors.
        batch (`dict`): what `model(**batch)` takes, with labels.
        settings ([`Settings`]): of the run.
        tracker ([`StorageTracker`]): not yet on.
        reference (`torch.nn.Module`, *optional*): see [`Settings`].
    """
    whole = whole_rows(settings) if settings.whole_rows else None
    masters = _Masters(model, settings, tracker)
    tracker.mark(model.buffers(), "weights")
    tracker.mark((value for value in (*batch.values(), whole) if isinstance(value, torch.Tensor)), "workspace")
    with tracker:
        masters.step()
        if settings.accumulates:
            masters.make_gradients()
        tracker.forget_peaks()
        tracker.phase = "start"
        backward(model, batch, settings, reference)
        tracker.kind, tracker.phase = "workspace", "step"
        masters.step()
    return PhasePeaks(dict(tracker.peaks), tracker.cpu_peak, tracker.cpu_count)


def backward(
    model: torch.nn.Module, batch: dict[str, Any], settings: Settings, reference: torch.nn.Module | None = None
) -> None:
    """Forward and backward of one micro-batch, as a trainer under accelerate runs them."""
    with torch.autocast(batch["input_ids"].device.type, settings.compute_dtype, enabled=settings.is_mixed):
        outputs = model(**batch)
        if reference is not None:  # in the same context, which keeps what it has cast of either model
            with torch.no_grad():
                reference(**batch)
    if settings.is_mixed and getattr(outputs, "logits", None) is not None:
        outputs.logits = outputs.logits.float()  # as accelerate hands them to the trainer
    loss = outputs.loss
    del outputs
    loss.backward()


class _Masters:
    """The tensors that the optimizer steps, its state, and the gradients, each with the share of one process.

    Under FSDP2 these are shards in the precision of the weights, and what the model computes with is gathered layer by
    layer; that is counted apart, as workspace.
    """

    def __init__(self, model: torch.nn.Module, settings: Settings, tracker: StorageTracker) -> None:
        self.tracker, self.share = tracker, 1.0
        parameters = list(model.parameters())
        self.trained = [p for p in parameters if p.requires_grad]
        self.stepped = self.trained
        self.gradient_shares = [1.0] * len(self.trained)
        if settings.wrapper == "fsdp2":
            self.share = 1 / settings.world_size
            dtype = torch.float32 if settings.is_mixed else settings.weights_dtype  # accelerate's choice
            self.stepped = [torch.empty(p.shape, dtype=dtype) for p in self.trained]
            frozen = [p for p in parameters if not p.requires_grad]
            tracker.mark(parameters, "weights", 0.0)
            tracker.mark([*frozen, *self.stepped], "weights", self.share)
            pairs = zip(self.trained, self.stepped)
            self.gradient_shares = [self.share * master.element_size() / p.element_size() for p, master in pairs]
        else:
            tracker.mark(parameters, "weights")
        for p, share in zip(self.trained, self.gradient_shares):
            p.register_post_accumulate_grad_hook(partial(_mark_gradient, tracker=tracker, share=share))
        self.optimizer = MAKE_OPTIMIZER[settings.optimizer](self.stepped)

    def step(self) -> None:
        """One step of the optimizer, which makes its state the first time, and no gradients after it."""
        kind = "workspace" if self.optimizer.state else "optimizer"
        borrowed = [tensor for tensor in self.stepped if tensor.grad is None]
        with self.tracker.made("gradients", 0.0):
            for tensor in borrowed:
                tensor.grad = torch.empty_like(tensor)
        with self.tracker.made(kind, self.share):
            self.optimizer.step()
        for tensor in (*self.stepped, *self.trained):
            tensor.grad = None

    def make_gradients(self) -> None:
        """Those of an earlier micro-batch."""
        for tensor, share in zip(self.trained, self.gradient_shares):
            tensor.grad = torch.empty_like(tensor)
            _mark_gradient(tensor, tracker=self.tracker, share=share)


def _mark_gradient(parameter: torch.Tensor, tracker: StorageTracker, share: float) -> None:
    tracker.mark(parameter.grad, "gradients", share)


def _adamw(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


MAKE_OPTIMIZER: dict[str, Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "lora": _adamw,
    "adafactor": partial(Adafactor, lr=1e-3, scale_parameter=False, relative_step=False),
    "sgd": partial(torch.optim.SGD, lr=1e-3),
}


def _batch(model: torch.nn.Module, settings: Settings) -> dict[str, object]:
    shape = settings.rows, settings.local_tokens
    scores_rows = model.get_output_embeddings() is None  # a reward a row; its loss is next to nothing
    names = ("input_ids",) if scores_rows else ("input_ids", "labels", "shift_labels")
    batch: dict[str, object] = {name: torch.empty(shape, dtype=torch.int64) for name in names}
    if scores_rows:
        batch["labels"] = torch.empty(settings.rows)
    size = settings.sequence_parallel_size
    rows = PlannedRows.of(size, settings.rows, settings.local_tokens, settings.on_gpu, settings.num_hashes)
    return {**batch, "sequence_shard": rows, "use_cache": False, "num_items_in_batch": 1}


def _offloading(run: Callable, tracker: StorageTracker) -> Callable:
    """What transformers puts around a checkpoint: its inputs live in CPU memory until they are needed."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        with tracker.made(CPU):
            return torch.empty_like(tensor)

    def offloaded(function, *args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(pack, torch.empty_like):
            return run(function, *args, **kwargs)

    return offloaded

"""What a step on preference pairs takes besides that of one model: the reference model, and rows that are whole.

TRL runs the reference between forward and backward of the policy, without gradients, when the policy's activations
are all there. It has weights and nothing else: no gradient, no state of an optimizer. Under FSDP2 TRL shards it as one
unit, so all of its weights are gathered while it runs.
"""

from __future__ import annotations

from functools import partial

import torch

from ..adapters.pass_shard import pass_shard
from ..adapters.recurrent.layers import follow_recurrences
from ..adapters.tiled_loss import tile_loss
from ..adapters.tiled_mlp import tile_mlp
from .fake_model import Stack, dtype_in_compute, fake_copy
from .layer_watch import watch_layers
from .settings import Settings
from .tracker import StorageTracker


REFERENCE = "reference"  # the first word of its phases
# Of 8 bytes, for each token of a whole row: ids, masks, labels, targets, positions, and what comes back of the head.
_NUMBERS_A_TOKEN = 10


def reference_model(
    model: torch.nn.Module, settings: Settings, stack: Stack | None, num_layers: int, tracker: StorageTracker
) -> torch.nn.Module:
    """The second model, as a trainer prepares it; made under the fake mode, see [`simulate`]."""
    fake = fake_copy(model, partial(dtype_in_compute, settings), stack, num_layers).eval()
    follow_recurrences(fake)
    pass_shard(fake)
    return prepare_reference(fake, settings, stack, tracker)


def prepare_reference(
    model: torch.nn.Module, settings: Settings, stack: Stack | None, tracker: StorageTracker
) -> torch.nn.Module:
    """Tiles, and the bytes of its weights, on fake or real tensors. Without gradients there are no checkpoints."""
    if settings.loss_tile_size is not None:
        tile_loss(model, settings.loss_tile_size)
    if settings.mlp_tile_size is not None:
        tile_mlp(model, settings.mlp_tile_size)
    for parameter in model.parameters():
        share = 1.0
        if settings.wrapper == "fsdp2":  # a shard of what was loaded; what it computes with is gathered
            share = settings.weights_dtype.itemsize / parameter.element_size() / settings.world_size
        tracker.mark(parameter, "weights", share)
    tracker.mark(model.buffers(), "weights")
    watch_layers(model, stack, tracker, REFERENCE)
    return model


def gathered_reference(model: torch.nn.Module, settings: Settings, phase: str) -> int:
    """Bytes that FSDP2 holds while the reference runs: its weights, and the buffer in which they arrive."""
    if settings.reference != "model" or settings.wrapper != "fsdp2" or phase.split()[0] != REFERENCE:
        return 0
    return 2 * sum(p.numel() for p in model.parameters()) * settings.compute_dtype.itemsize


def whole_rows(settings: Settings) -> torch.Tensor:
    """What every rank holds of whole rows besides its share."""
    tokens = settings.local_tokens * settings.sequence_parallel_size
    return torch.empty((_NUMBERS_A_TOKEN, settings.rows, tokens), dtype=torch.int64)

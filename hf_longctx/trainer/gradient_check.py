"""Outputs and gradients of a tiny sharded batch, equal to those of one process, where its positions cross thresholds.

Some faults hardly move the loss, and some begin at a length that a tiny row never has. So a random projection of the
outputs is differentiated with respect to the token embeddings, on rows whose positions lie around every length at
which the configuration says that something changes. Adapter weights that start at zero would hide what an adapter
does; they get values for the time of the check.

Price: two forwards and backwards of `4 P - 1` tokens for every such length and one more; no gradient is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..adapters.rotary_lengths import forget_lengths
from ..adapters.wrapped import unwrap
from ..families import length_thresholds, scales_by_count
from ..parallel.collectives import gather_sequence
from ..parallel.mesh import SequenceMesh
from ..parallel.shard import share_of_group
from ..tiny_check import REORDERED_SUMS, as_leaf, vectors_of


# Gradients add up more terms than outputs, and cancel more of them.
MORE_SUMS = 10
_STEP = 3  # of scales by position, whose own may be longer than any tiny row


def check_gradients(model, mesh: SequenceMesh, inner_attention: str, batch: dict[str, torch.Tensor]) -> None:
    """Refuse a model whose outputs or gradients on a share are others, also past lengths at which it changes.

    Args:
        model: on its device and in evaluation mode; every rank of the world calls this. Of a model whose weights are
            sharded, outputs alone are compared.
        mesh ([`SequenceMesh`]): the axes of the run.
        inner_attention (`str`): see [`LongContextConfig`].
        batch (`dict`): tiny full rows with `input_ids` and `attention_mask`.

    Raises:
        NotImplementedError: they differ.

    Communication: that of a forward and backward for each length.
    """
    size, name = mesh.sequence_parallel_size, type(unwrap(model)).__name__
    num_tokens = batch["input_ids"].shape[1]
    local_len = -(-num_tokens // size)
    config = unwrap(model).config.get_text_config()
    # The first share ends before the threshold, the row after it.
    starts = [max(threshold - local_len - 1, 0) for threshold in length_thresholds(config)]
    counted = torch.arange(num_tokens, device=batch["input_ids"].device).expand(len(batch["input_ids"]), -1)
    with _small_steps(model):
        for start in dict.fromkeys([0, *starts]):
            full = {**batch, "position_ids": counted + start}
            _compare(model, mesh, inner_attention, full, name, start)


def _compare(model, mesh, inner_attention, full, name: str, start: int) -> None:
    valid, group = full["attention_mask"].bool(), mesh.sp_group
    share = share_of_group(full, mesh, inner_attention=inner_attention, shift_labels=True)
    share = {key: value for key, value in share.items() if key != "shift_labels"}
    shard = share["sequence_shard"]
    first = shard.rank * shard.local_len
    places, whole_len = slice(first, first + shard.local_len), shard.size * shard.local_len
    runs = [_projected(model, share, places, whole_len)]
    runs.append(_projected(model, full, slice(0, valid.shape[1]), whole_len))
    dtype = precision_of(model, runs[0][0])
    is_half = dtype not in (torch.float64, torch.float32)
    if is_half:
        unaware_share = {key: value for key, value in share.items() if key != "sequence_shard"}
        runs.append(_projected(model, unaware_share, places, whole_len))
    for what, more, (local, expected, *unaware) in zip(("outputs", "gradients"), (1, MORE_SUMS), zip(*runs)):
        if local is None:
            continue
        whole = [gather_sequence(part, group)[:, : valid.shape[1]][valid] for part in (local, *unaware)]
        error, *baseline = (difference(part, expected[valid]) for part in whole)
        allowed = more * REORDERED_SUMS.of(dtype)
        # In half precision a router may choose another expert for a near tie; that stays far below the baseline.
        if error <= allowed or (is_half and error < baseline[0] / 5):
            continue
        where = f" at positions from {start:,} on, around a length at which it changes," if start else ""
        raise NotImplementedError(
            f"`{name}` gives other {what}{where} when its rows are sharded (largest relative difference {error:.1e}, "
            f"allowed {allowed:.0e}): one of its layers derives a number from what a rank sees of a row; set "
            "`sequence_parallel_size` to 1."
        )


def precision_of(model, outputs: torch.Tensor) -> torch.dtype:
    """In which the model computes, whatever it returns."""
    if torch.is_autocast_enabled(outputs.device.type):
        return torch.get_autocast_dtype(outputs.device.type)
    return min((next(model.parameters()).dtype, outputs.dtype), key=lambda dtype: dtype.itemsize)


def _projected(model, batch: dict, places: slice, whole_len: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Outputs, and the gradient of a random projection of them with respect to the token embeddings.

    Args:
        places (`slice`): of the batch's tokens in the row.
        whole_len (`int`): tokens of the row, with those that make it divisible.
    """
    forget_lengths(model)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        with torch.no_grad():
            return vectors_of(model(**batch)), None
    with embeddings_of(model) as found, torch.enable_grad():
        outputs = vectors_of(model(**batch))
        if not found or not outputs.requires_grad:
            return outputs.detach(), None
        generator = torch.Generator().manual_seed(3)
        whole = torch.randn(whole_len, outputs.shape[-1], generator=generator)
        weights = whole[places].to(outputs)[None] * batch["attention_mask"][..., None]
        gradients = torch.autograd.grad((outputs * weights).sum(), found, allow_unused=True)
    # A model may embed its tokens more than once, such as for a first pass that is not trained.
    used = [gradient for gradient in gradients if gradient is not None and gradient.shape[:2] == outputs.shape[:2]]
    return outputs.detach(), sum(used) if used else None


@contextlib.contextmanager
def embeddings_of(model) -> Iterator[list[torch.Tensor]]:
    """What the token embedding returns in the block, as leaves of the graph."""
    found: list[torch.Tensor] = []

    try:
        handle = unwrap(model).get_input_embeddings().register_forward_hook(lambda *call: as_leaf(call[-1], found))
    except (NotImplementedError, AttributeError):  # transformers does not know which it is
        yield found
        return
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def _small_steps(model) -> Iterator[None]:
    """A block in which scales by a position that layers count themselves change within a tiny row."""
    layers = [module for module in model.modules() if scales_by_count(module)]
    saved = [module.floor_scale for module in layers]
    for module in layers:
        module.floor_scale = min(module.floor_scale, _STEP)
    try:
        yield
    finally:
        for module, value in zip(layers, saved):
            module.floor_scale = value


@contextlib.contextmanager
@torch.no_grad()
def zeros_drawn(model) -> Iterator[None]:
    """A block in which adapter weights that are all zero, which hide an adapter, have small random values.

    They are the same on every rank, and zero again afterwards, to the bit. Weights that are sharded are left alone.
    """
    generator, drawn = torch.Generator().manual_seed(5), []
    for parameter in _adapter_parameters(model):
        is_whole = not hasattr(parameter, "full_tensor") and parameter.device.type != "meta"
        if is_whole and parameter.is_floating_point() and parameter.numel() and not bool(parameter.any()):
            drawn.append((parameter, parameter.detach().clone()))
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values.to(parameter))
    try:
        yield
    finally:
        for parameter, value in drawn:
            parameter.data.copy_(value)


def _adapter_parameters(model) -> Iterator[torch.nn.Parameter]:
    """What PEFT trains, and what its layers list as an adapter's, which may be frozen."""
    layers = [module for module in model.modules() if hasattr(module, "adapter_layer_names")]
    has_adapters = bool(layers) or hasattr(model, "peft_config")
    found = {id(item): item for item in model.parameters() if has_adapters and item.requires_grad}
    for module in layers:
        for name in module.adapter_layer_names:
            part = getattr(module, name, None)
            parameters = part.parameters() if isinstance(part, torch.nn.Module) else [part]
            found |= {id(item): item for item in parameters if isinstance(item, torch.nn.Parameter)}
    yield from found.values()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))

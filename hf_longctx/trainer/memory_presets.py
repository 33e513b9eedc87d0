"""What a run does to fit: tiled loss, tiled MLPs, checkpoints and their offload, as `MemoryConfig` says.

Checkpointing is that of transformers, set in its arguments before its trainer is built. MLPs are tiled when the model
is there, and the loss once the sanity check has seen the model's own.
"""

from __future__ import annotations

import logging
import os

import psutil
import torch

from ..adapters.reversible import make_reversible
from ..adapters.tiled_loss import tile_loss
from ..adapters.tiled_loss_check import prove_tiled_loss
from ..adapters.tiled_mlp import tile_mlp
from ..adapters.wrapped import unwrap
from ..config.memory import MemoryConfig
from ..config.run import LongContextConfig
from ..data.packing.collator import PackingCollator
from ..planner.measure import free_bytes
from ..planner.presets import MLP_TILE_SIZE, PRESETS, Preset
from ..planner.settings import GIB
from ..reporting.planned_memory import PlannedMemory, settings_of


logger = logging.getLogger(__name__)


def prepare_memory(memory: MemoryConfig, long_context: LongContextConfig, args, model, collator) -> Preset:
    """Choose the preset of a run, and enable transformers' activation checkpointing where it asks for that.

    Args:
        memory ([`MemoryConfig`]): `"auto"` takes the first preset with which the run fits.
        long_context ([`LongContextConfig`]): how many processes share a row.
        args (`TrainingArguments`, *optional*): changed in place.
        model: what the trainer was given.
        collator: likewise; a [`PackingCollator`] tells how long rows are.

    Raises:
        ValueError: there are no `args` to change; `memory="auto"` does not know the model or how long rows are, or no
            preset is enough for them; the node does not have enough CPU memory for the checkpoints that are offloaded.
    """
    if args is None and (memory.memory == "auto" or PRESETS[memory.memory].checkpointing):
        raise ValueError(
            f"`memory` ({memory.memory!r}) asks for activation checkpointing in the arguments of the run, but `args` "
            "is missing: pass `TrainingArguments`."
        )
    if memory.memory == "auto":
        preset = _plan(memory, long_context, args, model, collator)
    else:
        preset = PRESETS[memory.memory]
    if args is not None and preset.offload and args.device.type != "cpu" and isinstance(model, torch.nn.Module):
        _validate_cpu_memory(memory, long_context, args, model, collator, preset)
    if args is not None and preset.checkpointing:
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # older transformers know the second only
            if hasattr(args, name):
                setattr(args, name, True)
                # On a CPU the checkpoints are in CPU memory already, and transformers would pin a copy and fail.
                kwargs = {"use_reentrant": False, "offload": preset.offload and args.device.type != "cpu"}
                setattr(args, f"{name}_kwargs", kwargs | (getattr(args, f"{name}_kwargs") or {}))
    return preset


def apply_memory(trainer, preset: Preset, compares_plan: bool = True) -> None:
    """Make the layers of the trainer's model reversible and tile its MLPs where that is asked for; compare plan and
    run later.

    `compares_plan` is false where a step is not one that the planner knows: several models, or a head over rows.

    Raises:
        ValueError: `reversible_layers` is set and the model was trained in one stream.
        NotImplementedError: `mlp_tile_size` is set and the model has no MLP that can run in tiles.
    """
    if trainer.memory.reversible_layers:
        make_reversible(trainer.model)
    watches = any(isinstance(callback, PlannedMemory) for callback in trainer.callback_handler.callbacks)
    if trainer.memory.memory != "off" and compares_plan and not watches:
        watch = PlannedMemory(trainer.long_context, tiles_own_loss=not trainer.uses_model_loss)
        trainer.callback_handler.callbacks.insert(0, watch)  # before loggers and reports, which show what it adds
    tile_model_mlps(trainer, trainer.model, preset)


def tile_model_mlps(trainer, model, preset: Preset) -> None:
    """Tile the MLPs of a model of the trainer where that is asked for.

    Raises:
        NotImplementedError: `mlp_tile_size` is set and the model has no MLP that can run in tiles.
    """
    size = trainer.memory.mlp_tile_size
    if size is None and not preset.tiles_mlp:
        return
    try:
        tile_mlp(unwrap(model), size or MLP_TILE_SIZE)
    except NotImplementedError as error:
        if size is not None:
            raise
        logger.warning(f"`memory` ({preset.name!r}) leaves the MLPs whole: {error}")


def tile_trainer_loss(trainer, preset: Preset) -> None:
    """Let the trainer's model compute its loss in tiles, and prove that it is the same loss.

    Raises:
        NotImplementedError: `loss_tile_size` is set and the loss is not the model's own, or cannot be tiled.
    """
    size = trainer.memory.loss_tile_size
    if size is None and not preset.tiles_loss:
        return
    try:
        _validate_own_loss(trainer)
        handle = tile_loss(trainer.model, size)
        try:
            with trainer.accelerator.autocast():
                prove_tiled_loss(trainer.model)
            trainer._tiled_loss = handle
        except NotImplementedError:
            handle.remove()
            raise
    except NotImplementedError as error:
        if size is not None:
            raise
        if trainer.uses_model_loss:
            logger.warning(f"`memory` ({preset.name!r}) leaves the loss as it is: {error}")


def _validate_own_loss(trainer) -> None:
    """Raise `NotImplementedError` unless the trainer takes its loss, and nothing else, from the model."""
    size, reason = trainer.memory.loss_tile_size, None
    if not trainer.uses_model_loss:
        bases = {base.__name__ for base in type(trainer).__mro__}
        tiled = next((name for name in ("SFTTrainer", "DPOTrainer", "KTOTrainer") if name in bases), None)
        reason = "a head that pools a row has none over a vocabulary: leave `loss_tile_size` unset"
        if tiled is not None:
            reason = f"`{tiled}` computes it in tiles of its own already: leave `loss_tile_size` unset"
    elif trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        reason = "`compute_loss_func` and `label_smoothing_factor` need the logits: leave them out, or the tiles"
    elif trainer.compute_metrics is not None or trainer.preprocess_logits_for_metrics is not None:
        reason = "`compute_metrics` needs the logits: leave it out, or the tiles"
    if reason is not None:
        raise NotImplementedError(f"`loss_tile_size` ({size}) tiles the loss of the model, but {reason}.")


def _plan(memory: MemoryConfig, long_context: LongContextConfig, args, model, collator) -> Preset:
    """The cheapest preset under which this run fits the device."""
    from ..planner.memory_plan import Planner  # its simulations import half of torch, and most runs do without

    tokens = _row_tokens(memory, args, collator)
    if tokens is None:
        raise ValueError(
            "`memory` ('auto') does not know how long rows are: set `planned_tokens` to the tokens of the longest, or "
            "`memory` to 'max' or 'off'."
        )
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"`memory` ('auto') plans a model that is loaded, and `model` is {model!r}: load it with "
            "`from_pretrained` and pass the object, or set `memory` to one of its presets."
        )
    settings = settings_of(long_context, args, model, tokens, args.per_device_train_batch_size)
    device_bytes = _device_bytes(args)
    try:
        planner = Planner(unwrap(model).config)
        chosen = planner.choose_preset(settings, device_bytes)
    except NotImplementedError as error:
        logger.warning(f"`memory` ('auto') takes 'max', since this model cannot be planned: {error}")
        return PRESETS["max"]
    if chosen is None:
        longest = planner.longest_tokens(planner.preset("max", settings), device_bytes)
        raise ValueError(
            f"rows of {tokens:,} tokens need more than the {device_bytes / GIB:.1f} GiB of a device with every preset "
            f"of `memory`; the longest that the plan has room for are {longest:,}: shorten rows, raise "
            f"`sequence_parallel_size` ({long_context.sequence_parallel_size}), or set `memory` to 'max' and try."
        )
    preset, settings = chosen
    planned = planner.breakdown(settings).device
    logger.info(
        f"`memory` ('auto') takes {preset.name!r}: {planned / GIB:.2f} of {device_bytes / GIB:.1f} GiB are planned "
        f"for rows of {tokens:,} tokens"
    )
    return preset


def _validate_cpu_memory(
    memory: MemoryConfig, long_context: LongContextConfig, args, model, collator, preset: Preset
) -> None:
    """Raise `ValueError` if the longest row's checkpoints, of all ranks of this node, exceed its free memory.

    Where the length of rows is unknown, or the model cannot be planned, nothing is checked.
    """
    from ..planner.memory_plan import Planner

    tokens = _row_tokens(memory, args, collator)
    if tokens is None:
        return
    settings = settings_of(long_context, args, model, tokens, args.per_device_train_batch_size)
    settings, cpu_bytes = settings.of(processes_per_node=_local_world_size()), free_bytes("cpu")
    try:
        planner = Planner(unwrap(model).config)
        needed = planner.breakdown(planner.preset(preset, settings)).cpu
    except NotImplementedError:
        return
    if needed > cpu_bytes:
        raise ValueError(
            f"`memory` ({memory.memory!r}) keeps {needed / GIB:.2f} GiB of checkpoints in the CPU memory of this node "
            f"for rows of {tokens:,} tokens, and {cpu_bytes / GIB:.2f} GiB are free: shorten rows, start fewer "
            "processes on a node, or set `memory` to 'checkpoint'."
        )


def _row_tokens(memory: MemoryConfig, args, collator) -> int | None:
    """Tokens of the longest row, where somebody tells."""
    if memory.planned_tokens is not None:
        return memory.planned_tokens
    if isinstance(collator, PackingCollator) and collator.max_tokens is not None:
        return collator.max_tokens
    return getattr(args, "max_length", None)


def _device_bytes(args) -> int:
    """Memory of this process's device; on a CPU, its part of the machine's."""
    if args.device.type == "cuda":
        return torch.cuda.get_device_properties(args.device).total_memory
    return psutil.virtual_memory().total // _local_world_size()


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

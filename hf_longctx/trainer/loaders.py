"""Data loaders of a sharded run, by accelerate, with the data-parallel size in place of the process count.

Training streams come through here whether the run is sharded or not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import seed_worker
from transformers.utils import is_datasets_available

from ..adapters.wrapped import unwrap
from ..data.endless import endless_loader
from ..data.evaluation_rows import evaluation_loader
from ..data.packing.collator import fills_rows
from ..data.shard_collator import ShardCollator
from ..data.streams import is_stream, split_stream
from ..families import position_axes
from .checks import refuse_dispatcher
from .packed_rows import pack_dataset


logger = logging.getLogger(__name__)


def build_loader(trainer, dataset, description: str, batch_size: int, sampler_fn, is_training: bool) -> DataLoader:
    """transformers' `_get_dataloader` for batches that are cut by the collator, and for training streams.

    Differences: rows are assigned to groups, not to processes; random collators in workers are seeded by
    group; streams are read by every group itself, and training does not stop where they end; evaluation counts every
    row once.
    """
    mesh, args = trainer.mesh, trainer.args
    collator = trainer.data_collator
    is_endless = is_training and never_ends(trainer, dataset)
    own_stream = split_stream(dataset, mesh) if is_endless else None
    dataset = dataset if own_stream is None else own_stream
    if fills_rows(trainer.data_collator):
        # A group that has shards of its own does not know what the others draw.
        group_size = batch_size * mesh.data_parallel_size if own_stream is None else 1
        dataset, sampler_fn = pack_dataset(trainer, dataset, description, group_size, sampler_fn, is_training)
    elif is_datasets_available() and _is_hub_dataset(dataset):
        dataset = trainer._remove_unused_columns(dataset, description=description)
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description=description)
    if is_endless and own_stream is None and mesh.data_parallel_size > 1:
        dataset = IterableDatasetShard(
            dataset, batch_size, num_processes=mesh.data_parallel_size, process_index=mesh.data_parallel_rank
        )
    if trainer.shards_batches:
        collator = ShardCollator(
            collator,
            mesh,
            inner_attention=trainer.long_context.inner_attention,
            shift_labels=trainer.shifts_labels,
            position_axes=position_axes(unwrap(trainer.model).config),
        )
    arguments = {
        "batch_size": batch_size,
        "collate_fn": collator,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "in_order": getattr(args, "dataloader_in_order", True),
    }
    if not is_training:
        arguments["persistent_workers"] = False
        return evaluation_loader(dataset, mesh.data_parallel_size, mesh.data_parallel_rank, **arguments)
    if not isinstance(dataset, IterableDataset):
        arguments["sampler"] = sampler_fn(dataset) if sampler_fn is not None else None
        arguments["drop_last"] = args.dataloader_drop_last
        arguments["worker_init_fn"] = partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=mesh.data_parallel_rank
        )
    if is_endless:
        warn_about_workers(args.dataloader_num_workers, trainer.train_dataset)
        # Each pass is distributed by itself, and draws its workers' seed without moving the random numbers of the run.
        generator = torch.Generator().manual_seed(trainer.data_seed + mesh.data_parallel_rank)
        loader = endless_loader(DataLoader(dataset, generator=generator, **arguments))
        return assign_to_groups(trainer, loader, 1)
    return assign_to_groups(trainer, DataLoader(dataset, **arguments), mesh.data_parallel_size)


def never_ends(trainer, dataset) -> bool:
    """Whether training reads `dataset` again and again: a stream of unknown length."""
    return is_stream(dataset) and (fills_rows(trainer.data_collator) or not hasattr(dataset, "__len__"))


def check_streams(trainer) -> None:
    """Refuse to wait for the end of a training stream, which has none, or to distribute it in another way."""
    dataset = trainer.train_dataset
    if not any(
        never_ends(trainer, each) for each in (dataset.values() if isinstance(dataset, Mapping) else [dataset])
    ):
        return
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        if getattr(trainer.args, name) == "epoch":
            raise ValueError(
                f"`{name}` ('epoch') has no epoch to wait for: `train_dataset` is a stream of unknown length, which "
                "is read again and again until `max_steps`; set it to 'steps'."
            )
    if trainer.args.world_size > 1:
        refuse_dispatcher(trainer.args, "each of them reads a training stream itself")


def warn_about_workers(num_workers: int, dataset) -> None:
    """Warn that torch gives every data worker the whole of a stream of its own kind."""
    if num_workers > 1 and isinstance(dataset, IterableDataset) and not hasattr(dataset, "num_shards"):
        logger.warning(
            f"`dataloader_num_workers` is {num_workers}, and each worker reads all of `{type(dataset).__name__}` "
            "unless its `__iter__` asks `torch.utils.data.get_worker_info()`: every row would be trained as often; "
            "set it to 1, or train on a `datasets` stream, which divides its shards"
        )


def assign_to_groups(trainer, loader: DataLoader, groups: int) -> DataLoader:
    """A loader by accelerate whose batches go to groups of ranks in turn; the ranks of a group read the same ones.

    Args:
        trainer: with a mesh.
        loader (`DataLoader`): of all groups, or of this one.
        groups (`int`): the data-parallel size, or 1 where `loader` already yields this group's rows only.
    """
    accelerator, mesh = trainer.accelerator, trainer.mesh
    prepared = prepare_data_loader(
        loader,
        device=accelerator.device,
        num_processes=groups,
        process_index=mesh.data_parallel_rank % groups,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types or []),
        dispatch_batches=False,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    # accelerate would cut what is gathered on a ragged last batch to its rows, but a rank's sum is not a row.
    prepared._drop_last = True
    return prepared


def _is_hub_dataset(dataset) -> bool:
    import datasets

    return isinstance(dataset, datasets.Dataset)

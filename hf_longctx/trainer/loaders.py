"""Data loaders of a sharded run, on accelerate's own machinery told the data-parallel size, not the process count."""

from __future__ import annotations

from functools import partial

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import seed_worker
from transformers.utils import is_datasets_available

from ..data.collator import ShardCollator
from ..data.sampler import evaluation_loader
from .packing import pack_dataset, packs_rows, split_stream


def build_loader(trainer, dataset, description: str, batch_size: int, sampler_fn, is_training: bool) -> DataLoader:
    """The host's `_get_dataloader` for batches that are cut by the collator.

    Differences from the host: rows are dealt to groups, not to processes; random collators in workers are seeded by
    group; streams are read by every group itself; evaluation counts every row once.
    """
    mesh, args = trainer.mesh, trainer.args
    collator = trainer.data_collator
    own_stream = split_stream(dataset, mesh) if is_training and packs_rows(trainer) else None
    if packs_rows(trainer):
        documents = dataset if own_stream is None else own_stream
        dataset, sampler_fn = pack_dataset(trainer, documents, description, batch_size, sampler_fn, is_training)
    elif is_datasets_available() and _is_hub_dataset(dataset):
        dataset = trainer._remove_unused_columns(dataset, description=description)
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description=description)
    arguments = {
        "batch_size": batch_size,
        "collate_fn": ShardCollator(
            collator,
            mesh,
            inner_attention=trainer.long_context.inner_attention,
            shift_labels=trainer.shifts_labels,
        ),
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
    is_dealt = own_stream is not None
    return _deal_to_groups(trainer, DataLoader(dataset, **arguments), 1 if is_dealt else mesh.data_parallel_size)


def _deal_to_groups(trainer, loader: DataLoader, groups: int) -> DataLoader:
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

"""Data loaders of an embedding run: the same source on every rank, the same rows on the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from sentence_transformers.base.training_args import BatchSamplers, MultiDatasetBatchSamplers
from torch.utils.data import DataLoader

from ..config.sources import SourcesConfig
from ..data.sources.loader import build_source_loader
from ..trainer.loaders import assign_to_groups
from .evaluation_rounds import gathers_negatives, in_rounds


def describe_streams(dataset):
    """`dataset` with the columns of every stream known, as sentence-transformers needs them."""
    if isinstance(dataset, Mapping):
        described = {name: describe_streams(each) for name, each in dataset.items()}
        return (IterableDatasetDict if _has_stream(dataset) else DatasetDict)(described)
    if isinstance(dataset, IterableDataset) and dataset.column_names is None:
        return dataset._resolve_features()
    return dataset


def build_training_loader(trainer) -> DataLoader | None:
    """The loader of our own sources, of stock batches distributed to groups, or `None` for the stock loader."""
    dataset, args, mesh = trainer.train_dataset, trainer.args, trainer.mesh
    order = _host_order(args)
    if isinstance(dataset, Mapping) and order is not None and mesh.data_parallel_size > 1:
        raise ValueError(
            f"`{order}` ({getattr(args, order)!r}) lets each of {mesh.data_parallel_size} groups draw from another "
            "source in the same step, so negatives would mix sources: leave it unset, and say how often sources are "
            "drawn with `source_weights`."
        )
    has_sources = isinstance(dataset, (Mapping, IterableDataset)) or trainer.sources != SourcesConfig()
    if order is None and has_sources:
        loader = build_source_loader(
            dataset if isinstance(dataset, Mapping) else {"train_dataset": dataset},
            mesh,
            batch_size=args.train_batch_size,
            collate_fn=trainer.data_collator,
            seed=trainer.data_seed,
            config=trainer.sources,
            measure=_measure(trainer),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return assign_to_groups(trainer, loader, 1)
    if mesh.sequence_parallel_size == 1:
        return None
    trainer.accelerator.even_batches = False
    loader = trainer._build_dataloader(dataset, args.train_batch_size, dataset_kind="train")
    return assign_to_groups(trainer, loader, mesh.data_parallel_size)


def build_evaluation_loader(trainer, dataset) -> DataLoader:
    """The stock evaluation batches, distributed to groups; every row counts once."""
    if isinstance(dataset, str):
        dataset = trainer.eval_dataset[dataset]
    mesh, args = trainer.mesh, trainer.args
    # sentence-transformers sets this on several processes, where its ranks must have equal batches; ours need not.
    dropped, args.dataloader_drop_last = args.dataloader_drop_last, args.dataloader_drop_last and args.world_size == 1
    try:
        loader = trainer._build_dataloader(dataset, args.eval_batch_size, dataset_kind="eval")
    finally:
        args.dataloader_drop_last = dropped
    gathers = gathers_negatives(trainer.loss)
    loader = in_rounds(loader, mesh.data_parallel_size, mesh.data_parallel_rank, gathers)
    return assign_to_groups(trainer, loader, 1)


def _host_order(args) -> str | None:
    """The name of the argument with which the user asked for an order of sentence-transformers, if any."""
    if args.batch_sampler != BatchSamplers.BATCH_SAMPLER:
        return "batch_sampler"
    if args.multi_dataset_batch_sampler != MultiDatasetBatchSamplers.PROPORTIONAL:
        return "multi_dataset_batch_sampler"
    return None


def _measure(trainer) -> Callable | None:
    """A row to the tokens of each of its texts, where a budget is set and no column tells them."""
    config, model = trainer.sources, trainer.model
    if config.tokens_per_rank is None or config.balance_by is not None:
        return None
    limit = model.max_seq_length

    def measure(row: dict) -> list[int]:
        texts = [value for name, value in row.items() if isinstance(value, str) and name != "dataset_name"]
        ids = model.tokenizer(texts, truncation=limit is not None, max_length=limit, verbose=False)["input_ids"]
        return [max(1, len(each)) for each in ids]

    return measure


def _has_stream(dataset: Mapping[str, Dataset]) -> bool:
    return any(isinstance(each, IterableDataset) for each in dataset.values())

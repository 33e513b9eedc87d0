"""Data sets whose rows come one after another: which those are, and a group's part of one."""

from __future__ import annotations

import sys

from torch.utils.data import IterableDataset

from ..parallel.mesh import SequenceMesh


def is_stream(dataset: object) -> bool:
    """Whether rows come one after another, from `torch` or `datasets`, rather than by number."""
    hub = sys.modules.get("datasets")
    return isinstance(dataset, IterableDataset) or (hub is not None and isinstance(dataset, hub.IterableDataset))


def split_stream(dataset: object, mesh: SequenceMesh):
    """This group's shards of a `datasets` stream, or `None` if it does not have one a group.

    Documents are then assigned to groups before they are packed, and no group reads what others train on.
    """
    groups, hub = mesh.data_parallel_size, sys.modules.get("datasets")
    if groups == 1 or hub is None or not isinstance(dataset, hub.IterableDataset) or dataset.num_shards < groups:
        return None
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(dataset, rank=mesh.data_parallel_rank, world_size=groups)

"""What a blend was asked to be: sources, weights and rows, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...config.values import is_number
from ..streams import is_stream
from .proportions import BEHIND, MOST_SOURCES


def read_blends(blends: object) -> tuple[dict[str, Any], np.ndarray]:
    """The data set of every source, and the weights of each blend, `(blends, sources)`.

    Raises:
        ValueError: no blend, or a source or weight that cannot be.
        NotImplementedError: a stream.
    """
    stages = [blends] if isinstance(blends, Mapping) else blends
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
        raise ValueError(
            f"`sources` ({blends!r:.60}) must map names to `(data set, weight)`, or be a list of such mappings: give "
            "one at least."
        )
    datasets: dict[str, Any] = {}
    for number, stage in enumerate(stages):
        if not isinstance(stage, Mapping) or not stage:
            raise ValueError(f"blend {number} of `sources` has no source: map names to `(data set, weight)`.")
        for name, given in stage.items():
            if not isinstance(name, str) or not name:
                raise ValueError(
                    f"the source {name!r} of blend {number} is no text, or an empty one: names are texts, as in logs "
                    "and files."
                )
            _read_source(datasets, name, given)
    if len(datasets) > MOST_SOURCES:
        raise ValueError(
            f"`sources` has {len(datasets):,} sources, but an index counts them with 16 bits, up to {MOST_SOURCES:,}: "
            "join some of them with `datasets.concatenate_datasets`."
        )
    weights = np.zeros((len(stages), len(datasets)))
    places = {name: place for place, name in enumerate(datasets)}
    for number, stage in enumerate(stages):
        for name, given in stage.items():
            weights[number, places[name]] = _weight_of(given)
        _check_weights(number, weights[number])
    for name, dataset in datasets.items():
        _check_dataset(name, dataset)
    return datasets, weights


def _read_source(datasets: dict[str, Any], name: str, given: object) -> None:
    is_pair = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
    weight = _weight_of(given)
    if not is_number(weight) or weight <= 0:
        raise ValueError(
            f"the weight of source `{name}` ({weight!r}) must be a finite number above 0: write `{name!r}: (data set, "
            "weight)`, and leave out a source that is not wanted."
        )
    if is_pair:
        dataset = given[0]  # type: ignore[index]
        if datasets.setdefault(name, dataset) is not dataset:
            raise ValueError(
                f"the source `{name}` stands for two data sets, but a name is one source over all blends: use another "
                "name."
            )
    elif name not in datasets:
        raise ValueError(
            f"the source `{name}` has a weight and no data set: write `{name!r}: (data set, weight)` in the first "
            "blend that has it."
        )


def _weight_of(given: object) -> Any:
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        given = given[1]
    return given.item() if isinstance(given, np.generic) else given


def _check_weights(number: int, weights: np.ndarray) -> None:
    """Raise `ValueError` if numbers of this size have no sum, or no part of it, in double precision."""
    given = weights[weights > 0]
    with np.errstate(over="ignore"):
        parts = given.sum() / given
    if not np.isfinite(parts).all():
        raise ValueError(
            f"the weights of blend {number}, {given.min():g} to {given.max():g}, are too large to be added up, or too "
            "far apart: give shares, such as 0.3."
        )


def _check_dataset(name: str, dataset: Any) -> None:
    if is_stream(dataset):
        raise NotImplementedError(
            f"source `{name}` is a stream, and an index needs to know its rows: load it without `streaming`, or blend "
            "streams with `datasets.interleave_datasets`."
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, (str, Mapping)):
        raise ValueError(
            f"source `{name}` is a `{type(dataset).__name__}`, but must have a length and rows with numbers, as "
            "`datasets.Dataset` has."
        )
    if not len(dataset):
        raise ValueError(f"source `{name}` has no rows: leave it out, or check what it was filtered by.")


def read_num_rows(num_rows: object, blends: int, name: str = "num_rows") -> list[int]:
    """Rows of each blend; `ValueError` by the setting's `name` unless they are positive numbers, one a blend."""
    counts: list[Any] = [num_rows]
    if isinstance(num_rows, Sequence) and not isinstance(num_rows, str):
        counts = list(num_rows)
    if len(counts) != blends:
        raise ValueError(
            f"`{name}` ({num_rows!r}) has {len(counts)} numbers for {blends} blends: give the rows of each."
        )
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"`{name}` ({num_rows!r}) must be a positive number of rows, or a list of them.")
    if sum(map(int, counts)) > BEHIND:
        raise ValueError(
            f"`{name}` ({num_rows!r:.60}) is more than an index can have, {BEHIND:,.0f} rows: set it to the rows "
            "that the run trains."
        )
    return [int(count) for count in counts]


def read_cache_dir(cache_dir: object) -> str | None:
    """The folder's absolute path, or `None`; `ValueError` unless it names one."""
    if cache_dir is None:
        return None
    if not isinstance(cache_dir, (str, os.PathLike)) or not os.fspath(cache_dir):
        raise ValueError(f"`cache_dir` ({cache_dir!r:.60}) must name a folder, or be left out: an index in memory.")
    return os.path.abspath(os.fspath(cache_dir))

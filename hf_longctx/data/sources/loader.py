"""A data loader over many sources: rank `r`'s part of each global batch, ready for a collator.

What: `build_source_loader` checks the sources against each other and returns a plain `DataLoader` that already yields
this rank's rows, so they are not split again (`accelerate` prepares it with `num_processes=1`). Map-style sources
go through a batch sampler in the main process and any number of workers; streams are read whole by every rank, which
keeps its part. Price of a stream: every rank reads all rows of all ranks, by one worker at most. Price of
`deduplicate`, `balance_by` and `tokens_per_rank`: every rank reads the texts of all ranks, and a resumed run reads
them again up to where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ...config.sources import SourcesConfig
from ...parallel.mesh import SequenceMesh
from .batches import GlobalBatches
from .plan import SourcePlan, validate_names
from .rows import NAME_COLUMN, Candidate, IndexedRows, StreamedRows
from .shuffled import number_of
from .validation import (
    SourceColumns,
    check_sizes,
    check_sources,
    check_workers,
    columns_of,
    has_row_numbers,
    mean_length,
    measure_characters,
    measure_column,
    texts_of,
    validate_texts,
)


def build_source_loader(
    datasets: Mapping[str, Any],
    mesh: SequenceMesh,
    *,
    batch_size: int,
    collate_fn: Callable,
    seed: int = 0,
    config: SourcesConfig | None = None,
    measure: Callable[[dict], Sequence[int]] | None = None,
    linear_tokens: float = 12 * 1024,
    shuffle_buffer: int = 1000,
    **loader_arguments,
) -> DataLoader:
    """A `DataLoader` of this rank's rows of each global batch, the same sources on every rank.

    ```python
    loader = build_source_loader({"nli": nli, "docs": docs}, mesh, batch_size=64, collate_fn=collator, config=config)
    ```

    Every row carries the column `dataset_name` where there are several sources and one a batch. Under `accelerate`,
    prepare it with `num_processes=1` and `dispatch_batches=False`; `skip_first_batches`, `set_epoch` and workers work
    as for any loader.

    Args:
        datasets (`Mapping[str, Dataset]`):
            Sources by name: `datasets.Dataset` or any sequence of rows, or else all of them `datasets.IterableDataset`
            or torch's. A stream must yield the same rows on every rank: give its own `shuffle` a seed.
        mesh ([`SequenceMesh`]): the ranks of a sequence-parallel group read the same rows.
        batch_size (`int`): rows of every data-parallel rank.
        collate_fn (`Callable`): a list of rows to a batch.
        seed (`int`, *optional*, defaults to 0): the same on all ranks.
        config ([`SourcesConfig`], *optional*): how sources are drawn.
        measure (`Callable`, *optional*):
            A row to the tokens of each of its texts, instead of what `balance_by` names. It may cut them off.
        linear_tokens (`float`, *optional*, defaults to `12 * 1024`): 12 times the hidden size; see [`packing_cost`].
        shuffle_buffer (`int`, *optional*, defaults to 1000): rows of a `datasets` stream that are shuffled; 0: none.
        loader_arguments: of `DataLoader`: `num_workers`, `pin_memory` and the like.

    Returns:
        `torch.utils.data.DataLoader`: with `len()` of one pass over all rows; endless, without it, for streams and
        where only `measure` tells tokens.

    Raises:
        ValueError: what cannot be drawn; before the first batch where it can be known.

    Communication: none.
    """
    config = SourcesConfig() if config is None else config
    caps = cast("dict[str, int]", config.source_caps or {})  # the config has read the text of a command line
    validate_names("source_caps", caps, tuple(datasets))
    columns = {name: columns_of(name, dataset, config.balance_by, measure) for name, dataset in datasets.items()}
    check_sources(datasets, columns, config, batch_size * mesh.data_parallel_size, has_measure=measure is not None)
    rows = {
        name: None if not has_row_numbers(dataset) else min(len(dataset), caps.get(name, len(dataset)))
        for name, dataset in datasets.items()
    }
    plan = SourcePlan(
        rows,
        weights=cast("dict[str, float] | None", config.source_weights),
        temperature=config.source_temperature,
        sources_per_batch=config.sources_per_batch,
        swap_probability=config.swap_probability,
        seed=seed,
    )
    check_sizes(plan, rows, batch_size, mesh.data_parallel_size, config.tokens_per_rank)
    reader = SourceReader(
        datasets,
        columns,
        rows,
        plan,
        mesh,
        config,
        batch_size,
        _measure(config, measure),
        linear_tokens,
        shuffle_buffer,
    )
    if reader.is_stream:
        check_workers(loader_arguments.get("num_workers", 0))
        return DataLoader(SourceStream(reader), batch_size=None, collate_fn=collate_fn, **loader_arguments)
    sampler = SourceBatchSampler(reader, has_length=measure is None)
    return DataLoader(SourceTable(reader), batch_sampler=sampler, collate_fn=collate_fn, **loader_arguments)


@dataclass(frozen=True, eq=False)
class SourceReader:
    """Everything that decides which rows a rank draws; workers get a copy. Made by [`build_source_loader`]."""

    datasets: Mapping[str, Any]
    columns: Mapping[str, SourceColumns]
    rows: Mapping[str, int | None]
    plan: SourcePlan
    mesh: SequenceMesh
    config: SourcesConfig
    batch_size: int
    measure: Callable[[dict, SourceColumns], Sequence[int]] | None
    linear_tokens: float
    shuffle_buffer: int

    @property
    def is_stream(self) -> bool:
        return any(count is None for count in self.rows.values())

    def batches(self) -> GlobalBatches:
        """The global batches from the first on."""
        return GlobalBatches(
            self.plan,
            {name: self._source(name) for name in self.datasets},
            ranks=self.mesh.data_parallel_size,
            batch_size=self.batch_size,
            tokens_per_rank=self.config.tokens_per_rank,
            balanced=self.measure is not None,
            linear_tokens=self.linear_tokens,
        )

    def fetch(self, name: str, numbers: list[int]) -> list[dict]:
        """Rows of a map-style source."""
        dataset = self.datasets[name]
        if hasattr(dataset, "__getitems__"):
            return dataset.__getitems__(numbers)
        return [dataset[number] for number in numbers]

    def finish(self, name: str, number: int | None, row: dict, swapped: bool) -> dict:
        """The row as the collator gets it: without the lengths, swapped, with the name of its source."""
        columns = self.columns[name]
        validate_texts(name, number, row, columns)
        values = [row[column] for column in columns.texts]
        finished = {column: row[column] for column in columns.used}
        if swapped:
            finished |= dict(zip(columns.texts, reversed(values)))
        if len(self.datasets) > 1 and self.config.sources_per_batch == 1:
            finished[NAME_COLUMN] = name
        return finished

    def _source(self, name: str):
        dataset, count, seed = self.datasets[name], self.rows[name], self.plan.seed
        describe = partial(self._describe, name)
        if count is not None:
            reads = self.config.deduplicate or self.measure is not None
            read = partial(self.fetch, name) if reads else None
            return IndexedRows(name, count, describe, total=len(dataset), read=read, seed=seed)
        cap = cast("dict[str, int]", self.config.source_caps or {}).get(name)
        if self.shuffle_buffer and hasattr(dataset, "shuffle"):
            dataset = dataset if cap is None else dataset.take(cap)
            order = number_of("stream", seed, name) % 2**32
            dataset = dataset.shuffle(seed=order, buffer_size=self.shuffle_buffer)
        return StreamedRows(name, describe, stream=dataset, cap=cap)

    def _describe(self, name: str, rows: list[tuple[int, Any]]) -> list[Candidate]:
        if not rows or rows[0][1] is None:
            return [Candidate(name, number, ((name, number),)) for number, _ in rows]
        columns, described = self.columns[name], []
        for number, row in rows:
            streamed = self.rows[name] is None
            validate_texts(name, None if streamed else number, row, columns)
            texts = texts_of(row, columns)
            # A stream's numbers say nothing once it is shuffled again, but the same texts are the same row.
            keys = {(name, *texts) if streamed else (name, number), *(texts if self.config.deduplicate else ())}
            lengths = () if self.measure is None else tuple(self.measure(row, columns))
            described.append(Candidate(name, row if streamed else number, tuple(keys), lengths))
        return described


class SourceTable(Dataset):
    """The rows of map-style sources by `(source, number, swapped)`, as [`SourceBatchSampler`] names them."""

    def __init__(self, reader: SourceReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return sum(cast("Mapping[str, int]", self.reader.rows).values())

    def __getitem__(self, key: tuple[str, int, bool]) -> dict:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[str, int, bool]]) -> list[dict]:
        rows: dict[int, dict] = {}
        for name in dict.fromkeys(name for name, _, _ in keys):
            places = [place for place, key in enumerate(keys) if key[0] == name]
            fetched = self.reader.fetch(name, [keys[place][1] for place in places])
            rows |= {
                place: self.reader.finish(*keys[place][:2], row, keys[place][2]) for place, row in zip(places, fetched)
            }
        return [rows[place] for place in range(len(keys))]


class SourceBatchSampler(Sampler):
    """This rank's rows of each global batch: a `batch_sampler` for [`SourceTable`].

    Epoch `e` is the draws from `e * len()` on, so epochs continue each other; without a length there is one epoch
    that never ends. Made by [`build_source_loader`].

    Args:
        reader ([`SourceReader`]): what is drawn.
        has_length (`bool`): whether the number of batches of one pass is known.
    """

    def __init__(self, reader: SourceReader, *, has_length: bool = True) -> None:
        self.reader, self.epoch, self.batch_size, self.drop_last = reader, 0, reader.batch_size, False
        self._length = self._count() if has_length or reader.config.tokens_per_rank is None else None
        self._going: GlobalBatches | None = None

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of another epoch; call it before each, on all ranks."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(
                "`measure` tells the tokens of a row when it is drawn, so the batches of one pass are not known: set "
                "`max_steps`, or store the tokens in a column and name it in `balance_by`."
            )
        return self._length

    def __iter__(self) -> Iterator[list[tuple[str, int, bool]]]:
        first = 0 if self._length is None else self.epoch * self._length
        batches, self._going = self._going, None
        if batches is None or batches.draws != first:
            batches = self.reader.batches()
            batches.skip(first)
        while self._length is None or batches.draws < first + self._length:
            batch = next(batches)
            share = batch.shares[self.reader.mesh.data_parallel_rank]
            yield [(candidate.source, candidate.row, batch.swapped) for candidate in share]
        self._going = batches

    def _count(self) -> int:
        reader, ranks = self.reader, self.reader.mesh.data_parallel_size
        rows = cast("Mapping[str, int]", reader.rows)  # no stream is among them
        if reader.config.tokens_per_rank is None:
            return math.ceil(sum(rows.values()) / (reader.batch_size * ranks))
        tokens = [rows[name] * mean_length(name, data, reader.columns[name]) for name, data in reader.datasets.items()]
        return math.ceil(sum(tokens) / (reader.config.tokens_per_rank * ranks))


class SourceStream(IterableDataset):
    """This rank's rows of each global batch over streams, one list a batch, without an end."""

    def __init__(self, reader: SourceReader) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self.reader.batches():
            share = batch.shares[self.reader.mesh.data_parallel_rank]
            yield [self.reader.finish(row.source, None, row.row, batch.swapped) for row in share]


def _measure(config: SourcesConfig, measure) -> Callable[[dict, SourceColumns], Sequence[int]] | None:
    if measure is not None:
        return partial(_measured_by, measure)
    if config.balance_by is None:
        return None
    return measure_characters if config.balance_by == "characters" else measure_column


def _measured_by(measure: Callable[[dict], Sequence[int]], row: dict, columns: SourceColumns) -> Sequence[int]:
    return measure(row)

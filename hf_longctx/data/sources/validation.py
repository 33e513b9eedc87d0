"""What sources must agree on, what their columns mean, and the messages for what does not fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ...config.sources import SourcesConfig
from .plan import SourcePlan, validate_sources
from .rows import LABEL_COLUMNS, NAME_COLUMN


@dataclass(frozen=True)
class SourceColumns:
    """Columns of one source in their order.

    Args:
        used (`tuple[str, ...]`): what a collator gets: all but the lengths and the name of the source.
        texts (`tuple[str, ...]`): those that are no labels.
        length (`str`, *optional*): holds the tokens of a row.
    """

    used: tuple[str, ...]
    texts: tuple[str, ...]
    length: str | None = None


def has_row_numbers(dataset: object) -> bool:
    """Whether row `i` can be read by its number, and how many there are is known."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def columns_of(name: str, dataset: object, balance_by: str | None, measure: Callable | None) -> SourceColumns:
    """Read the columns of a source, from its first row unless a stream knows them.

    Raises:
        ValueError: no row, or no column of the name `balance_by`.
    """
    found = getattr(dataset, "column_names", None) if not has_row_numbers(dataset) else None
    if not found:
        found = list(_first_row(name, dataset))
    length = balance_by if balance_by not in (None, "characters") and measure is None else None
    if length is not None and length not in found:
        raise ValueError(
            f"`balance_by` ({length!r}) is no column of source `{name}`, which has {', '.join(found)}: name the "
            "column with the tokens of a row, or 'characters'."
        )
    used = tuple(column for column in found if column not in (NAME_COLUMN, balance_by))
    return SourceColumns(used, tuple(column for column in used if column not in LABEL_COLUMNS), length)


def check_sources(
    datasets: Mapping[str, object],
    columns: Mapping[str, SourceColumns],
    config: SourcesConfig,
    global_rows: int,
    *,
    has_measure: bool,
) -> None:
    """Raise `ValueError` where sources do not go together as `config` wants them drawn."""
    streams = [name for name, dataset in datasets.items() if not has_row_numbers(dataset)]
    others = [name for name in datasets if name not in streams]
    if streams and others:
        raise ValueError(
            f"source `{streams[0]}` is a stream and source `{others[0]}` is not, but all must be of one kind: use "
            f"`.to_iterable_dataset()` on `{others[0]}` and on all others that are no streams."
        )
    shares = config.sources_per_batch
    if shares > 1:
        _check_mixed(datasets, columns, shares)
    if config.tokens_per_rank is None and global_rows % shares:
        raise ValueError(
            f"`sources_per_batch` ({shares}) must divide the {global_rows} rows of a global batch, since every source "
            "fills an equal share of it: change it or the batch size."
        )
    if config.swap_probability:
        for name, found in columns.items():
            if len(found.texts) != 2:
                raise ValueError(
                    f"`swap_probability` ({config.swap_probability}) exchanges the two texts of a pair, but source "
                    f"`{name}` has {len(found.texts)} ({', '.join(found.texts)}): set it to 0, or keep two columns."
                )
    if config.tokens_per_rank is not None and not has_measure and config.balance_by in (None, "characters"):
        raise ValueError(
            f"`tokens_per_rank` ({config.tokens_per_rank}) needs to know the tokens of every row, but `balance_by` is "
            f"{config.balance_by!r}: name the column that holds them, or pass `measure`."
        )


def check_sizes(
    plan: SourcePlan, rows: Mapping[str, int | None], batch_size: int, ranks: int, tokens_per_rank: int | None
) -> None:
    """Raise `ValueError` where a source has fewer rows than one global batch takes of it."""
    for name, count in rows.items():
        wanted, setting = ranks, "number of ranks"
        if tokens_per_rank is None:
            wanted = batch_size * ranks // plan.sources_per_batch * plan.most_shares(name)
            setting = "batch size"
        if count is not None and count < wanted:
            raise ValueError(
                f"source `{name}` has {count} rows, but one global batch takes up to {wanted} of it, and a row drawn "
                f"twice would be its own negative: lower the {setting}, or leave the source out."
            )


def check_workers(num_workers: int) -> None:
    """Raise `ValueError` if several workers would read a stream: each would be given a part by `datasets`."""
    if num_workers > 1:
        raise ValueError(
            f"`num_workers` ({num_workers}) would split streams between workers, so that no two see the same rows: "
            "set it (in a trainer `dataloader_num_workers`) to 0 or 1."
        )


def texts_of(row: dict, columns: SourceColumns) -> list[str]:
    """The strings of a row, also those in lists."""
    found = []
    for column in columns.texts:
        value = row[column]
        found += [item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, str)]
    return found


def validate_texts(name: str, number: int | None, row: dict, columns: SourceColumns) -> None:
    """Raise `ValueError` for a row without a column or with nothing in it."""
    for column in columns.texts:
        value = row.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            place = f"row {number}" if number is not None else f"the row {str(row)[:60]!r}"
            raise ValueError(
                f"source `{name}` has no text in column `{column}` of {place}: filter such rows out, since an empty "
                "text has no meaning to learn."
            )


def measure_characters(row: dict, columns: SourceColumns) -> list[int]:
    """A quarter of the characters of every text: about its tokens in English, good enough to balance ranks."""
    return [max(1, len(text) // 4) for text in texts_of(row, columns)]


def measure_column(row: dict, columns: SourceColumns) -> list[int]:
    """The tokens of a row as its column tells them."""
    tokens = row[columns.length]
    if not isinstance(tokens, (int, np.integer)) or tokens < 1:
        raise ValueError(
            f"column `{columns.length}` holds {tokens!r}, but `balance_by` needs a whole number of tokens, at least 1."
        )
    return [int(tokens)]


def mean_length(name: str, dataset, columns: SourceColumns) -> float:
    """The mean of the column of lengths, over all rows."""
    if hasattr(dataset, "with_format"):
        lengths = dataset.with_format("numpy")[columns.length][:]
    else:
        lengths = [row[columns.length] for row in dataset]
    return float(np.mean(lengths))


def _first_row(name: str, dataset) -> dict:
    if has_row_numbers(dataset):
        validate_sources({name: len(dataset)})
        return dataset[0]
    for row in dataset:
        return row
    raise ValueError(f"the stream of source `{name}` has no row: leave it out, or check what it was filtered by.")


def _check_mixed(datasets: Mapping[str, object], columns: Mapping[str, SourceColumns], shares: int) -> None:
    first, *names = columns
    for name in names:
        if columns[name].used != columns[first].used:
            raise ValueError(
                f"`sources_per_batch` ({shares}) puts sources into one batch, but source `{first}` has the columns "
                f"{', '.join(columns[first].used)} and source `{name}` has {', '.join(columns[name].used)}: rename "
                "them, or set it to 1."
            )
    for name, dataset in datasets.items():
        if NAME_COLUMN in _first_row(name, dataset):
            raise ValueError(
                f"`sources_per_batch` ({shares}) puts sources into one batch, but the loss, the prompts or the router "
                f"of this run differ by source, and a batch has one name: set it to 1. Source `{name}` names itself."
            )

"""Sources of texts, and the loaders of all ranks over them in one process."""

from __future__ import annotations

from itertools import count, islice

from hf_longctx import SequenceMesh, SourcesConfig
from hf_longctx.data.sources.loader import build_source_loader


def pairs(name: str, rows: int, texts: int | None = None, **columns) -> list[dict]:
    """Rows of a source; `texts`: positives that differ."""
    words = [1 + (7 * number) % 23 for number in range(rows)]
    return [
        {
            "anchor": f"{name} question {number}",
            "positive": f"{name} answer {number % (texts or rows)}" + " word" * words[number % (texts or rows)],
            **{column: values(number) for column, values in columns.items()},
        }
        for number in range(rows)
    ]


def as_rows(rows: list) -> list:
    return rows


def loaders(datasets: dict, ranks: int = 1, batch_size: int = 4, seed: int = 0, sp: int = 1, **config):
    """One loader a data-parallel rank."""
    given_ = {name: config.pop(name) for name in ("measure", "num_workers", "shuffle_buffer") if name in config}
    return [
        build_source_loader(
            datasets,
            SequenceMesh(ranks, sp, rank, sp - 1),
            batch_size=batch_size,
            collate_fn=as_rows,
            seed=seed,
            config=SourcesConfig(**config),
            **given_,
        )
        for rank in range(ranks)
    ]


def endless(loader):
    """Epoch after epoch, as a trainer draws them."""
    for epoch in count():
        if hasattr(loader.batch_sampler, "set_epoch"):
            loader.batch_sampler.set_epoch(epoch)
        yield from loader


def draw(datasets: dict, batches: int | None = None, **options) -> list[tuple[list[dict], ...]]:
    """The first `batches` global batches, or one epoch, as the rows of every rank."""
    every = loaders(datasets, **options)
    return list(zip(*every)) if batches is None else list(islice(zip(*map(endless, every)), batches))


def name_of(row: dict) -> str:
    return row["anchor"].split()[0]


def number_of(row: dict) -> int:
    return int(row["anchor"].split()[2])


def flat(batch) -> list[dict]:
    return [row for share in batch for row in share]


TWO = {"x": pairs("x", 120), "y": pairs("y", 40)}

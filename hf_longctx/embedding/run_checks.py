"""What an embedding run cannot do, and what it would lose in silence, refused before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice

from ..config.sources import SourcesConfig


logger = logging.getLogger(__name__)

_SAMPLE = 1000  # rows of a source that are tokenized to see what would be cut off


def check_named_sources(dataset: object, config: SourcesConfig) -> None:
    """Raise `ValueError` for settings of sources by name where the training data are one data set without a name."""
    if isinstance(dataset, Mapping):
        return
    for name in ("source_weights", "source_temperature", "source_caps"):
        value = getattr(config, name)
        if value is not None:
            raise ValueError(
                f"`{name}` ({value!r}) speaks of sources by name, but `train_dataset` is one "
                f"`{type(dataset).__name__}`: pass a dictionary from names to data sets."
            )


def report_truncation(trainer) -> None:
    """Say how many texts, and how many of their tokens, the tokenizer will cut off; by choice refuse it.

    Up to 1,000 rows of every source are tokenized without a limit, evenly spread where rows can be addressed.
    """
    policy, model = trainer.texts.overlong_texts, trainer.model
    limit, tokenizer = model.max_seq_length, model.tokenizer
    if policy == "truncate" or limit is None or limit > 10**9 or not callable(tokenizer):
        return
    if trainer.train_dataset is None or not trainer.is_world_process_zero() and policy != "error":
        return
    num_texts = num_long = num_tokens = num_lost = 0
    for texts in _sampled_texts(trainer.train_dataset):
        for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]:
            num_texts += 1
            num_tokens += len(ids)
            num_long += len(ids) > limit
            num_lost += max(len(ids) - limit, 0)
    if not num_long:
        return
    message = (
        f"{num_long} of {num_texts} texts looked at are longer than `model.max_seq_length` ({limit}), and "
        f"{num_lost / num_tokens:.1%} of all tokens would be cut off unseen"
    )
    if policy == "error":
        raise ValueError(
            f"{message}: raise `model.max_seq_length`, split the texts, or set `overlong_texts` to 'truncate'."
        )
    logger.warning(f"{message}; set `overlong_texts` to 'truncate' if that is meant, or to 'error' to stop there")


def _sampled_texts(dataset) -> Iterator[list[str]]:
    sources = dataset.values() if isinstance(dataset, Mapping) else [dataset]
    for source in sources:
        if hasattr(source, "__len__"):
            step = max(1, len(source) // _SAMPLE)
            rows: Iterator = (source[index] for index in range(0, len(source), step))
        else:
            rows = islice(iter(source), _SAMPLE // 10)
        for row in rows:
            texts = [value for name, value in row.items() if isinstance(value, str) and name != "dataset_name"]
            if texts:
                yield texts

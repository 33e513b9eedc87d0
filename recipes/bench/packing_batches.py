"""What `packing.py` trains on: documents of two length mixes, and the batches that each way of collating makes.

What: `draw_lengths` and `make_documents` give random tokens in documents as long as those of a mix; `padded`,
`packed_by_trl` and `packed_by_us` turn one list of documents into batches, the last two into rows of at most
`row_tokens` tokens. How: the collators are those a user gets, TRL's and ours. Price: seconds; collating is not in the
measured time.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch


CANDIDATES = 4000  # draws among which the one with the median padding stands for the mix
# How far below the budget of the packed rows a draw may be: best fit then fills exactly that many rows.
LEAST_FILL, MOST_FILL = 0.93, 0.99


@dataclass(frozen=True)
class Mix:
    """Lengths of documents: lognormal, cut off at both ends.

    Args:
        label (`str`): name in the table.
        mean_log, deviation_log (`float`): mean and standard deviation of the logarithm of the length in tokens.
        shortest, longest (`int`): lengths outside are clipped.
    """

    label: str
    mean_log: float
    deviation_log: float
    shortest: int = 16
    longest: int = 2048

    def draw(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        lengths = np.exp(rng.normal(self.mean_log, self.deviation_log, shape))
        return lengths.clip(self.shortest, self.longest).astype(np.int64)


def from_mean(label: str, mean: float, deviation: float) -> Mix:
    """A mix by the mean and standard deviation of its lengths in tokens."""
    variance_log = np.log(1 + (deviation / mean) ** 2)
    return Mix(label, np.log(mean) - variance_log / 2, np.sqrt(variance_log))


# FLAN puts one-line questions next to whole articles: short on average, and very uneven. A median of 150 tokens and a
# deviation of 1 in the logarithm give a mean of 243, one document in twenty under 29 tokens and one in a hundred over
# 1,500. OrcaMath is word problems with worked solutions: longer and more alike, 400 tokens on average, 200 up or down.
# What counts here is the padding they cause. In random batches of 4 it is 54 % and 35 %, so leaving it out can make
# training 2.2 and 1.5 times as fast; published for the real sets are 2 and 1.4 times
# (https://huggingface.co/blog/packing-with-FA2).
MIXES = {
    "flan": Mix("FLAN-like", float(np.log(150)), 1.0),
    "orcamath": from_mean("OrcaMath-like", 400, 200),
}
CHECKED_LENGTHS = (64, 3, 130, 17, 1, 57, 57, 96)  # one token, equal lengths, no powers of two


def draw_lengths(mix: Mix, row_tokens: int, rows: int, seed: int = 0) -> tuple[np.ndarray, int, float]:
    """Lengths of the documents of about `rows` packed rows, typical of `mix` in what padding them costs.

    So few documents could be lucky or unlucky, so many draws are made, and the one with the median padding is taken.

    Returns:
        tuple of the lengths, the documents of one padded batch, and the padding share of the average draw.
    """
    rng = np.random.default_rng(seed)
    mix = Mix(mix.label, mix.mean_log, mix.deviation_log, mix.shortest, min(mix.longest, row_tokens))
    batch_size = max(1, round(row_tokens / mix.draw(rng, 100_000).mean()))
    draws = mix.draw(rng, CANDIDATES, rows, batch_size)
    real = draws.sum(axis=(1, 2))
    padding = 1 - real / (draws.max(axis=2).sum(axis=1) * batch_size)
    fill = real / (rows * row_tokens)
    fitting = np.flatnonzero((fill >= LEAST_FILL) & (fill <= MOST_FILL))
    if not len(fitting):
        raise ValueError(
            f"`row_tokens` ({row_tokens}) is too short for the {mix.label} mix: no draw of {batch_size} documents a "
            "row fills it; use longer rows."
        )
    typical = fitting[np.argsort(padding[fitting])[len(fitting) // 2]]
    return draws[typical].ravel(), batch_size, float(padding.mean())


def make_documents(lengths, vocab: int, seed: int = 1) -> list[dict[str, list[int]]]:
    """Random tokens, every one trained; token 0 is left for padding."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, vocab, length).tolist() for length in lengths]
    return [{"input_ids": row, "labels": list(row)} for row in ids]


def pad(documents: list[dict]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest, as TRL's collator pads them."""
    longest = max(len(document["input_ids"]) for document in documents)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**document, "attention_mask": [1] * len(document["input_ids"])} for document in documents]
    return {
        key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])
        for key, fill in fills.items()
    }


def padded(documents: list[dict], batch_size: int, row_tokens: int) -> list[dict]:
    """Documents in the order they come, each batch padded on the right to its longest."""
    collate = pad
    if importlib.util.find_spec("trl") is not None:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        collate = DataCollatorForLanguageModeling(pad_token_id=0)
    return [collate(documents[start : start + batch_size]) for start in range(0, len(documents), batch_size)]


def packed_by_trl(documents: list[dict], batch_size: int, row_tokens: int) -> list[dict]:
    """TRL's best-fit packing and padding-free collator, as `SFTConfig(packing=True)` sets them up.

    Without TRL: our best fit, which makes the same rows in batches of the same form.
    """
    if importlib.util.find_spec("trl") is None:
        return packed_by_us(documents, batch_size, row_tokens)
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    disable_progress_bars()
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return [collate([row]) for row in pack_dataset(Dataset.from_list(documents), row_tokens, strategy="bfd")]


def packed_by_us(documents: list[dict], batch_size: int, row_tokens: int) -> list[dict]:
    """`PackedDataset` and `PackingCollator`."""
    from hf_longctx.data.packing.collator import PackingCollator
    from hf_longctx.data.packing.datasets import PackedDataset

    rows, collate = PackedDataset(documents, row_tokens), PackingCollator(max_tokens=row_tokens)
    return [collate([rows[index]]) for index in range(len(rows))]


COLLATORS = {"padded": padded, "trl": packed_by_trl, "ours": packed_by_us}


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())

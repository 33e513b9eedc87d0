"""What `hf-longctx pack` counts, prints and draws.

It reads lengths only (or counts them with a tokenizer), packs them with every strategy and compares the rows with
batches that are padded. Waste and rows are counted exactly; the speed-up is an estimate by the cost model of
[`packing_cost`].
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..data.documents import check_texts, load_documents
from ..data.packing.datasets import measure_lengths
from ..data.packing.lengths import STRATEGIES, Packing, cut_documents, pack_lengths, packing_cost
from ..data.streams import is_stream


_LENGTH_COLUMN = "length"
_COUNTED = (_LENGTH_COLUMN, "input_ids")  # columns that make a tokenizer needless
_PICTURES = (".png", ".svg")
_SEED = 0


@dataclass(frozen=True)
class Padded:
    """Documents in random batches, each padded to its longest.

    Args:
        waste (`float`): share of the computed tokens that is padding.
        cost (`float`): of all rows at the length of their batch, by [`packing_cost`].
    """

    waste: float
    cost: float

    @classmethod
    def measure(cls, lengths: np.ndarray, batch_size: int, linear_tokens: float) -> Padded:
        """Pad `lengths` in an order drawn from a fixed seed."""
        lengths = np.random.default_rng(_SEED).permutation(lengths)
        starts = np.arange(0, len(lengths), batch_size)
        rows = np.diff(np.append(starts, len(lengths)))
        computed = np.repeat(np.maximum.reduceat(lengths, starts), rows)
        return cls(1 - float(lengths.sum() / computed.sum()), packing_cost(computed, linear_tokens))


def report_packing(console: Console, options: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    lengths, source = _read_lengths(options)
    # Empty documents are left out below; the check comes before, so that it tells the row numbers of the data set.
    cut_documents(np.maximum(lengths, 1), options.max_tokens, options.long_documents)
    documents = lengths[lengths > 0]
    if not len(documents):
        raise ValueError(f"the {len(lengths)} documents of `{options.dataset}` have no tokens: check what was read.")
    settings = {"long_documents": options.long_documents, "seed": _SEED}
    packings = {name: pack_lengths(documents, options.max_tokens, strategy=name, **settings) for name in STRATEGIES}
    linear_tokens = 12 * options.hidden_size
    # Padded batches get the same pieces, so that both sides train the same tokens.
    pieces = packings["in_order"].lengths
    padded = Padded.measure(pieces, options.batch_size, linear_tokens)

    facts = Table.grid(padding=(0, 2))
    facts.add_row("lengths from", escape(source))
    facts.add_row("documents", f"{len(documents):,}, and {len(lengths) - len(documents):,} empty ones left out")
    facts.add_row("tokens", f"{documents.sum():,}")
    facts.add_row("longest, median", f"{documents.max():,}, {np.median(documents):,.0f} tokens")
    over = f"{(documents > options.max_tokens).sum():,} documents ({options.long_documents})"
    facts.add_row(f"over {options.max_tokens:,} tokens", over)
    facts.add_row("padding waste now", f"{padded.waste:.1%} of the tokens in random batches of {options.batch_size}")
    console.print(facts)
    table = Table("strategy", "rows", "efficiency", "costliest row", box=box.SIMPLE if console.is_terminal else None)
    for name, packing in packings.items():
        costs = packing.costs(linear_tokens)
        spread = f"{costs.max() / costs.mean():.2f} x the mean"
        table.add_row(name, f"{len(packing):,}", f"{packing.efficiency:.2%}", spread)
    console.print(table)
    speedup = padded.cost / packing_cost(pieces, linear_tokens)
    console.print(
        f"expected speed-up of packing over padding: {speedup:.2f} times, an estimate that counts operations for a "
        f"hidden size of {options.hidden_size}; measure before you rely on it"
    )
    if options.output is None:
        return
    if draw_packing(Path(options.output), documents, packings, padded, options):
        console.print(f"wrote {options.output}", markup=False)
    else:
        missing = (
            f"warning: `{options.output}` was not drawn, matplotlib is missing: run `pip install hf-longctx[demo]`"
        )
        console.print(missing, markup=False)


def draw_packing(
    path: Path, lengths: np.ndarray, packings: dict[str, Packing], padded: Padded, options: argparse.Namespace
) -> bool:
    """Draw lengths next to waste; `False` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.geomspace(lengths.min(), lengths.max() + 1, 50)
    left.hist(lengths, bins=edges, color="tab:blue")
    left.axvline(options.max_tokens, color="tab:red", linestyle="--", label=f"{options.max_tokens:,} tokens a row")
    left.set(title="Lengths of documents", xlabel="tokens", ylabel="documents", xscale="log")
    left.legend(frameon=False)
    left.yaxis.get_major_locator().set_params(integer=True)
    bars = {f"padded,\nbatches of {options.batch_size}": padded.waste}
    bars |= {f"packed,\n{name.replace('_', ' ')}": 1 - packing.efficiency for name, packing in packings.items()}
    drawn = right.bar(list(bars), [100 * waste for waste in bars.values()], color=["tab:red", *["tab:green"] * 3])
    right.bar_label(drawn, fmt="%.1f %%")
    right.tick_params(axis="x", labelsize=8)
    right.set(title="Waste: padding, or room left in a row", ylabel="percent of tokens")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True


def validate_options(options: argparse.Namespace) -> None:
    """Raise `ValueError` before anything is read if an option is of no use."""
    for name in ("batch_size", "hidden_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` ({value}) must be at least 1.")
    if options.output is None:
        return
    path = Path(options.output)
    if path.suffix.lower() not in _PICTURES or path.is_dir():
        raise ValueError(f"`--output` ({path}) must be a picture, which may be written over: end it in .png or .svg.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of `--output` ({path}) does not exist: make it first.")


def _read_lengths(options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Tokens of every document, and where the numbers come from."""
    where = {"split": options.split, "config_name": options.config_name, "streaming": options.streaming}
    dataset = load_documents(options.dataset, text_field=options.text_field, or_columns=_COUNTED, **where)
    if options.limit is not None:
        dataset = dataset.take(options.limit)
    row: dict[str, Any] = next(iter(dataset), {})
    if isinstance(row.get(_LENGTH_COLUMN), int):
        column = _LENGTH_COLUMN
    elif "input_ids" in row:
        column = "input_ids"
    else:
        lengths = _count_tokens(dataset, list(row), options)
        return lengths, f"{options.model_name_or_path} on the column `{options.text_field}`"
    if is_stream(dataset):
        values = (row[column] for row in dataset)
        lengths = np.fromiter((value if column == _LENGTH_COLUMN else len(value) for value in values), np.int64)
    else:
        lengths = measure_lengths(dataset, _LENGTH_COLUMN)
    return lengths, f"the column `{column}`"


def _count_tokens(dataset, names: list[str], options: argparse.Namespace) -> np.ndarray:
    if not names:
        raise ValueError(f"`{options.dataset}` has no rows in `--split` {options.split}: check what was read.")
    if options.text_field not in names:
        raise ValueError(
            f"`{options.dataset}` has none of the columns `{_LENGTH_COLUMN}`, `input_ids` and `{options.text_field}`, "
            f"only {', '.join(names)}: name the column of the text with `--text_field`."
        )
    if options.model_name_or_path is None:
        raise ValueError(
            f"`{options.dataset}` holds text, whose tokens only a tokenizer can count: name it with "
            "`--model_name_or_path`, a hub id or a folder."
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    lengths: list[int] = []
    for batch in dataset.iter(batch_size=1000):
        texts = batch[options.text_field]
        check_texts(texts, options.text_field, range(len(lengths), len(lengths) + len(texts)), f"`{options.dataset}`")
        lengths += map(len, tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"])
    return np.array(lengths, dtype=np.int64)

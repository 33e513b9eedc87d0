"""What `hf-longctx pack` counts, prints and draws.

It reads lengths only (or counts them with a tokenizer), packs them with every strategy and compares the rows with
batches that are padded. Waste and rows are counted exactly; the speed-up is an estimate by the cost model of
[`packing_cost`].
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from ..data.packing.lengths import STRATEGIES, Packing, cut_documents, pack_lengths, packing_cost
from .pack_inputs import read_lengths


if TYPE_CHECKING:
    from .answer import Answer

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


def report_packing(answer: Answer, options: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    console = answer.console
    lengths, source = read_lengths(options)
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
    answer.facts |= {
        "dataset": options.dataset,
        "lengths_from": source,
        "documents": len(documents),
        "empty_documents": len(lengths) - len(documents),
        "tokens": documents.sum(),
        "longest": documents.max(),
        "median": np.median(documents),
        "max_tokens": options.max_tokens,
        "over_max_tokens": (documents > options.max_tokens).sum(),
        "padded": {"batch_size": options.batch_size, "waste": padded.waste},
        "strategies": {name: _facts_of(packing, linear_tokens) for name, packing in packings.items()},
        "speedup": speedup,
        "picture": None,
    }
    console.print(
        f"expected speed-up of packing over padding: {speedup:.2f} times, an estimate that counts operations for a "
        f"hidden size of {options.hidden_size}; measure before you rely on it"
    )
    if options.output is None:
        return
    if draw_packing(Path(options.output), documents, packings, padded, options):
        answer.facts["picture"] = options.output
        answer.print(f"wrote {options.output}")
    else:
        missing = (
            f"warning: `{options.output}` was not drawn, matplotlib is missing: run `pip install hf-longctx[demo]`"
        )
        answer.print(missing)


def _facts_of(packing: Packing, linear_tokens: float) -> dict[str, float]:
    costs = packing.costs(linear_tokens)
    return {
        "rows": len(packing),
        "efficiency": packing.efficiency,
        "costliest_row_to_mean": float(costs.max() / costs.mean()),
    }


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

"""Can LSH attention find a token that stands half a row back? The duplication task of the Reformer paper, in small.

    python recipes/lsh_duplication.py --output_dir runs/lsh_duplication

A row is `0 w 0 w`, with random symbols `w`; the second half is to be predicted. One layer must look at exactly one
token, far away. Models of one layer with shared queries and keys are trained with full attention, with LSH attention
in both layouts, and with a window alone; each is then run with all of them.
Source: Kitaev et al., arXiv 2001.04451, table 2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from ..adapters.hashed import use_lsh
from ..adapters.tied_query_key import tie_query_key
from ..config.lsh_settings import LSHConfig
from .recipe_file import parse_toy, refuse_earlier_numbers


NUMBERS_FILE, TABLE_FILE = "lsh_duplication.json", "lsh_duplication.md"
TRAINED = ("full", "LSH-4", "LSH-1", "causal LSH-4", "window")
RUN = ("full", *(f"LSH-{n}" for n in (8, 4, 2, 1)), *(f"causal LSH-{n}" for n in (8, 4, 2, 1)), "window")


@dataclass
class DuplicationArguments:
    """Of the rows, the model and the runs."""

    output_dir: str = field(default="runs/lsh_duplication", metadata={"help": "Where numbers and the table go."})
    row_tokens: int = field(default=64, metadata={"help": "Tokens of a row, both halves."})
    num_symbols: int = field(default=64, metadata={"help": "Symbols besides 0."})
    width: int = field(default=64, metadata={"help": "Of the model; it has one layer and four heads."})
    window: int = field(default=16, metadata={"help": "Tokens of a chunk, or of a bucket that a query sees."})
    steps: int = field(default=1000, metadata={"help": "Steps at most; a model that solved its task ends before."})
    batch_size: int = field(default=16, metadata={"help": "Rows of a step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW."})
    every: int = field(default=100, metadata={"help": "Steps between two looks at whether the task is solved."})
    init_std: float = field(
        default=0.1, metadata={"help": "Of weights; at 0.02, BERT's own, some models of width 64 stop halfway."}
    )
    num_eval_rows: int = field(default=128, metadata={"help": "Rows that accuracies are measured on."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of weights and rows; one model each."})
    trained: list[str] = field(default_factory=lambda: list(TRAINED), metadata={"help": "What models train with."})
    device: str = field(default="cpu", metadata={"help": "Where they do."})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.trained) - set(RUN))
        if unknown:
            raise ValueError(f"`trained` ({', '.join(unknown)}) must be of {', '.join(RUN)}.")
        if self.row_tokens < 4 or self.row_tokens % 2:
            raise ValueError(f"`row_tokens` ({self.row_tokens}) must be even and at least 4: a row is two halves.")
        if self.init_std <= 0:
            raise ValueError(f"`init_std` ({self.init_std}) must be above 0: weights that start alike stay alike.")

    def attention(self, name: str) -> LSHConfig:
        """What a name of [`RUN`] means."""
        if name in ("full", "window"):
            window = self.row_tokens if name == "full" else self.window
            return LSHConfig(num_hashes=1, num_buckets=1, window=window)
        layout = "causal" if name.startswith("causal") else "reformer"
        buckets = max(2, 2 * (self.row_tokens // self.window))  # as in the paper: two for each chunk
        rounds = int(name.rpartition("-")[2])
        return LSHConfig(num_hashes=rounds, num_buckets=buckets, window=self.window, layout=layout)


def draw_rows(toy: DuplicationArguments, count: int, generator: torch.Generator) -> torch.Tensor:
    """Rows `0 w 0 w`, `(count, row_tokens)`."""
    half = toy.row_tokens // 2
    symbols = torch.randint(1, toy.num_symbols + 1, (count, half - 1), generator=generator)
    side = torch.nn.functional.pad(symbols, (1, 0))
    return torch.cat([side, side], dim=1).to(toy.device)


def build(toy: DuplicationArguments, seed: int) -> torch.nn.Module:
    """One layer with learned positions, which makes keys as it makes queries."""
    config = AutoConfig.for_model(
        "bert",
        vocab_size=toy.num_symbols + 1,
        hidden_size=toy.width,
        intermediate_size=4 * toy.width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=toy.row_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=toy.init_std,
        pad_token_id=None,
        is_decoder=True,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="lsh").to(toy.device)
    tie_query_key(model)
    return model


def train(toy: DuplicationArguments, name: str, seed: int) -> tuple[torch.nn.Module, int]:
    """A model that was trained with one attention, and the steps that it took."""
    model = build(toy, seed)
    use_lsh(model, toy.attention(name))
    optimizer = torch.optim.AdamW(model.parameters(), toy.learning_rate)
    generator = torch.Generator().manual_seed(seed + 1)
    for step in range(1, toy.steps + 1):
        rows = draw_rows(toy, toy.batch_size, generator)
        loss = _loss(toy, model(rows, use_cache=False).logits, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % toy.every == 0 and accuracy(toy, model, name, seed) >= 0.999:
            return model, step
    return model, toy.steps


def _second_half(toy: DuplicationArguments, logits: torch.Tensor, rows: torch.Tensor):
    """What is predicted from the second 0 on, and the symbols that follow."""
    half = toy.row_tokens // 2
    return logits[:, half:-1], rows[:, half + 1 :]


def _loss(toy: DuplicationArguments, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    predicted, targets = _second_half(toy, logits, rows)
    return torch.nn.functional.cross_entropy(predicted.flatten(0, 1), targets.flatten())


@torch.no_grad()
def accuracy(toy: DuplicationArguments, model: torch.nn.Module, name: str, seed: int) -> float:
    """The share of symbols that a model finds with some attention, on rows that it was not trained on."""
    handle, right = use_lsh(model, toy.attention(name)), []
    rows = draw_rows(toy, toy.num_eval_rows, torch.Generator().manual_seed(seed + 2))
    for part in rows.split(toy.batch_size):
        predicted, targets = _second_half(toy, model(part, use_cache=False).logits, part)
        right.append((predicted.argmax(-1) == targets).flatten())
    handle.remove()
    return float(torch.cat(right).float().mean())


def compare(toy: DuplicationArguments) -> Iterator[dict]:
    """One row for each model: with what and from which seed it was trained, its steps, and what it finds."""
    for name in toy.trained:
        for seed in toy.seeds:
            model, steps = train(toy, name, seed)
            accuracies = {run: accuracy(toy, model, run, seed) for run in RUN}
            yield {"trained": name, "seed": seed, "steps": steps, **accuracies}


def cells_of(found: list[dict]) -> list[list[str]]:
    """For each attention that models were trained with, the steps of each seed, and the means of what they find."""
    lines = []
    for name in dict.fromkeys(row["trained"] for row in found):
        rows = [row for row in found if row["trained"] == name]
        means = (sum(row[run] for row in rows) / len(rows) for run in RUN)
        lines.append([name, ", ".join(f"{row['steps']:,}" for row in rows), *(f"{mean:.3f}" for mean in means)])
    return lines


def as_markdown(found: list[dict]) -> str:
    """The table of the paper: a line for each model, a column for what it runs with."""
    lines = ["| trained with | steps | " + " | ".join(RUN) + " |", "|---|" + "---|" * (len(RUN) + 1)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in cells_of(found))]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    toy = parse_toy(DuplicationArguments, arguments)
    refuse_earlier_numbers(Path(toy.output_dir), NUMBERS_FILE, TABLE_FILE)
    folder, table = Path(toy.output_dir), Table("trained with", "steps", *RUN)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for row in compare(toy):  # an interrupted run keeps what it has found
        found.append(row)
        (folder / NUMBERS_FILE).write_text(json.dumps({"settings": vars(toy), "found": found}, indent=1) + "\n")
        (folder / TABLE_FILE).write_text(as_markdown(found))
    for cells in cells_of(found):
        table.add_row(*cells)
    Console(width=130).print(table)
    Console().print(f"Numbers: {folder / NUMBERS_FILE}", soft_wrap=True)

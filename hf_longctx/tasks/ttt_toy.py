"""A toy that only learning while reading can solve: every row has its own random table of next tokens.

    python recipes/ttt.py --config recipes/ttt_markov_toy.yaml

A symbol is followed by its successor in the row's table with probability `follow`, else by any symbol, so the table is
what there is to learn, and it does not fit in the window. Three arms of the same sizes: inner steps in training and
while reading (E2E), none (window only), and window-only training with steps while reading alone (naive, the best of
several learning rates). `attention: false` takes attention away from all of them, as in the paper's Figure 2.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator, set_seed

from ..config.test_time import TTTConfig
from ..config.values import is_number, validate_choice, validate_count, validate_positive
from ..trainer.causal_lm import LongContextTrainer
from ..ttt.fast_model import TTTForCausalLM
from .recipe_file import refuse_earlier_numbers


NUMBERS_FILE = "ttt_toy.json"
E2E, WINDOW, NAIVE = "E2E", "window only", "naive"
NAIVE_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
PARTS = 8
TOYS = ("markov",)
_COUNTS = {
    "window": "tokens",
    "chunk_tokens": "tokens",
    "fast_size": "columns",
    "steps": "steps",
    "batch_size": "rows",
    "num_eval_rows": "rows",
    "seeds": "repetitions",
}


@dataclass
class ToyArguments:
    """Of the rows, the models and the runs."""

    toy: str = field(default="markov", metadata={"help": "What the rows are; its presence tells the recipe."})
    output_dir: str = field(default="runs/ttt_toy", metadata={"help": "Where the numbers go."})
    report_to: str = field(default="none", metadata={"help": "none: the numbers are in `output_dir`."})
    symbols: int = field(default=32, metadata={"help": "Symbols of a row, and entries of its table."})
    follow: float = field(default=0.9, metadata={"help": "Probability that a symbol is followed by its successor."})
    row_tokens: int = field(default=256, metadata={"help": "Tokens of a row."})
    window: int = field(default=16, metadata={"help": "Tokens that attention sees."})
    chunk_tokens: int = field(default=16, metadata={"help": "Tokens after which fast weights take a step."})
    hidden_size: int = field(default=32, metadata={"help": "Width of the model, of two layers."})
    fast_size: int = field(default=64, metadata={"help": "Width of the fast MLP."})
    attention: bool = field(default=True, metadata={"help": "false: no token sees another, in all arms."})
    steps: int = field(default=400, metadata={"help": "Steps of each arm."})
    batch_size: int = field(default=16, metadata={"help": "Rows of a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of AdamW."})
    num_eval_rows: int = field(default=64, metadata={"help": "Rows that the losses are measured on."})
    seeds: int = field(default=1, metadata={"help": "Repetitions, with other weights and rows."})

    def __post_init__(self) -> None:
        if self.report_to != "none":
            raise ValueError(f"`report_to` ({self.report_to!r}) must be none: the toy's numbers are in `output_dir`.")
        validate_choice("toy", self.toy, TOYS)
        validate_count("symbols", self.symbols, "symbols", least=2)
        for name, what in _COUNTS.items():
            validate_count(name, getattr(self, name), what)
        validate_positive("learning_rate", self.learning_rate, "the step of AdamW")
        if not (is_number(self.follow) and 0 <= self.follow < 1):
            raise ValueError(f"`follow` ({self.follow!r}) must be a probability from 0 to below 1.")
        least = max(PARTS, self.chunk_tokens) + 1
        if self.row_tokens < least:
            raise ValueError(
                f"`row_tokens` ({self.row_tokens}) must be at least {least}: losses are shown in {PARTS} parts, and "
                f"the first inner step comes after `chunk_tokens` ({self.chunk_tokens})."
            )
        if self.hidden_size < 4 or self.hidden_size % 4:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of 4: two heads, each of an even width."
            )

    @property
    def floor(self) -> float:
        """Loss of who knows the table."""
        rest = (1 - self.follow) / self.symbols
        return -(self.follow + rest) * math.log(self.follow + rest) - (self.symbols - 1) * rest * math.log(rest)


class MarkovRows(Dataset):
    """Rows of one table each; a row depends on the seed and its number alone."""

    def __init__(self, toy: ToyArguments, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tables = torch.randint(toy.symbols, (count, toy.symbols), generator=generator)
        rows = [torch.randint(toy.symbols, (count,), generator=generator)]
        for _ in range(toy.row_tokens - 1):
            chosen = tables[torch.arange(count), rows[-1]]
            free = torch.randint(toy.symbols, (count,), generator=generator)
            rows.append(torch.where(torch.rand(count, generator=generator) < toy.follow, chosen, free))
        self.tables, self.input_ids = tables, torch.stack(rows, 1)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.input_ids[index]}


def tiny_model(toy: ToyArguments, seed: int, learning_rate: float) -> TTTForCausalLM:
    """Two layers of Llama, the second with fast weights."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=toy.symbols,
        hidden_size=toy.hidden_size,
        intermediate_size=2 * toy.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=toy.row_tokens,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    base = LlamaForCausalLM(config)
    if not toy.attention:
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.requires_grad_(False).zero_()
    settings = TTTConfig(
        window=toy.window,
        chunk_tokens=toy.chunk_tokens,
        suffix_layers=1,
        fast_intermediate_size=toy.fast_size,
        inner_learning_rate=learning_rate,
    )
    return TTTForCausalLM.from_base(base, settings)


def train(toy: ToyArguments, seed: int, learning_rate: float) -> TTTForCausalLM:
    """One arm; `learning_rate` is that of the inner steps, and 0 is the arm without them."""
    model = tiny_model(toy, seed, learning_rate)
    args = TrainingArguments(
        output_dir=toy.output_dir,
        max_steps=toy.steps,
        per_device_train_batch_size=toy.batch_size,
        learning_rate=toy.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=seed,
    )
    rows = MarkovRows(toy, toy.steps * toy.batch_size, seed=1000 + seed)
    trainer = LongContextTrainer(model=model, args=args, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    return model.eval()


def losses_by_part(model: TTTForCausalLM, rows: MarkovRows, learning_rate: float) -> list[float]:
    """Mean loss in each eighth of the rows, read with `learning_rate` for the inner steps."""
    model.inner_learning_rate = learning_rate
    losses = model.read_losses(rows.input_ids.to(model.device), learn=learning_rate > 0)
    return [float(part.mean()) for part in losses.tensor_split(PARTS, dim=1)]


def compare(toy: ToyArguments, seed: int) -> dict[str, Any]:
    """Train two models and measure three arms, and the naive one at every rate."""
    rows = MarkovRows(toy, toy.num_eval_rows, seed=seed)
    found: dict[str, Any] = {}
    found[E2E] = losses_by_part(train(toy, seed, 1.0), rows, 1.0)
    window = train(toy, seed, 0.0)
    found[WINDOW] = losses_by_part(window, rows, 0.0)
    naive = {rate: losses_by_part(window, rows, rate) for rate in NAIVE_RATES}
    found[NAIVE] = min(naive.values(), key=last_quarter)
    found["naive by rate"] = {str(rate): losses for rate, losses in naive.items()}
    return found


def last_quarter(losses: list[float]) -> float:
    """Mean loss in the last quarter of the rows."""
    return sum(losses[-PARTS // 4 :]) / (PARTS // 4)


def main(toy: ToyArguments) -> list[dict]:
    """Print every seed's losses by eighths, and write them."""
    console, folder, results = Console(), Path(toy.output_dir), []
    refuse_earlier_numbers(folder, NUMBERS_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(toy.seeds):
        table = Table("arm", *(f"{part + 1}/{PARTS}" for part in range(PARTS)), title=f"seed {seed}")
        found = compare(toy, seed)
        for name in (E2E, WINDOW, NAIVE):
            table.add_row(name, *(f"{loss:.2f}" for loss in found[name]))
        results.append({"seed": seed, **found})
        console.print(table)
        settings = {"settings": vars(toy), "floor": toy.floor, "results": results}
        (folder / NUMBERS_FILE).write_text(json.dumps(settings, indent=1) + "\n")
    console.print(f"Loss with the table known {toy.floor:.2f}, with nothing known {math.log(toy.symbols):.2f}.")
    console.print(f"Numbers: {folder / NUMBERS_FILE}", soft_wrap=True)
    return results

"""Which kinds of sparse layers can recall: four DeepSeek-V4 of two layers learn the same rows.

    python recipes/recall_sparse.py --output_dir runs/recall_sparse

Layers with a window alone see some tokens back; heavily compressed ones see one entry for many tokens; compressed
sparse ones see one entry for a few tokens, and pick entries. All have the same window, and what is counted are
questions whose answer stands further back than all windows together reach, so only entries can carry it. The model
that picks a few starts from the one that sees all entries: its indexers are warmed up, then everything is trained.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..config.indexer import IndexerConfig
from ..trainer.causal_lm import LongContextTrainer
from .recall_rows import AtStep, RecallRows, copy_model
from .recipe_file import parse_toy, refuse_earlier_numbers


LAYERS = 2
KINDS = {
    "window": "sliding_attention",
    "heavily compressed": "heavily_compressed_attention",
    "all entries": "compressed_sparse_attention",
}
PICKED = "picked entries"
NUMBERS_FILE, PICTURE_FILE = "recall_sparse.json", "recall_sparse.png"


@dataclass
class RecallArguments:
    """Of the rows, the models and the runs."""

    output_dir: str = field(default="runs/recall_sparse", metadata={"help": "Where numbers and the picture go."})
    row_tokens: int = field(default=96, metadata={"help": "Tokens of a row."})
    num_keys: int = field(default=16, metadata={"help": "Keys that a row binds to values, and asks for."})
    num_values: int = field(default=8, metadata={"help": "Values of a key: a guess is right once in as many."})
    window: int = field(default=8, metadata={"help": "Tokens that every layer sees besides its entries."})
    index_topk: int = field(default=4, metadata={"help": "Entries that a query picks, of one for 4 tokens."})
    steps: int = field(default=400, metadata={"help": "Steps of the models that pick nothing."})
    dense_steps: int = field(default=100, metadata={"help": "Steps in which indexers alone are trained."})
    sparse_steps: int = field(default=50, metadata={"help": "Steps in which the model that picks is trained."})
    every: int = field(default=25, metadata={"help": "Steps between two points of a curve."})
    batch_size: int = field(default=8, metadata={"help": "Rows of a step."})
    num_eval_rows: int = field(default=64, metadata={"help": "Rows that a point of a curve is measured on."})
    seed: int = field(default=0, metadata={"help": "Of weights and rows."})

    @property
    def beyond(self) -> int:
        """How far back the windows of all layers together reach."""
        return LAYERS * self.window

    def rows(self, steps: int, seed: int) -> RecallRows:
        return RecallRows(steps * self.batch_size, self.row_tokens, self.num_keys, self.num_values, seed)


def tiny_config(toy: RecallArguments, kind: str) -> object:
    """A DeepSeek-V4 with layers of one kind, whose indexers pick everything."""
    return AutoConfig.for_model(
        "deepseek_v4",
        vocab_size=RecallRows.vocab_size(toy.num_keys, toy.num_values),
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS,
        layer_types=[kind] * LAYERS,
        mlp_layer_types=["moe"] * LAYERS,
        n_routed_experts=2,
        num_experts_per_tok=1,
        num_attention_heads=2,
        head_dim=32,
        partial_rotary_factor=0.25,
        q_lora_rank=32,
        o_groups=1,
        o_lora_rank=32,
        hc_mult=1,
        hc_sinkhorn_iters=2,
        sliding_window=toy.window,
        # One entry holds half of a row, where all bindings stand.
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": toy.row_tokens // 2},
        index_n_heads=16,
        index_head_dim=16,
        index_topk=toy.row_tokens,
        max_position_embeddings=2 * toy.row_tokens,
        initializer_range=0.1,
    )


def compare(toy: RecallArguments) -> dict[str, list[dict[str, float]]]:
    """Train all models.

    Returns:
        The curve of each: `step`, and `accuracy` at questions whose answer stands beyond all windows, on rows that
        none was trained on, as transformers computes it.
    """
    eval_rows = RecallRows(toy.num_eval_rows, toy.row_tokens, toy.num_keys, toy.num_values, toy.seed + 2)
    args = TrainingArguments(
        output_dir=toy.output_dir,
        max_steps=toy.steps,
        per_device_train_batch_size=toy.batch_size,
        learning_rate=5e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        adam_beta2=0.95,
        logging_steps=toy.every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=toy.seed,
    )
    curves: dict[str, list[dict[str, float]]] = {}

    def watched(name: str, steps: int, before: int = 0) -> AtStep:
        """What adds a point to the curve of `name` every few steps."""
        curve = curves.setdefault(name, [])

        def add(step: int, model) -> None:
            right = eval_rows.accuracy(copy_model(model, "eager"), toy.beyond)
            curve.append({"step": before + step, "accuracy": right})

        return AtStep([*range(toy.every, steps, toy.every), steps], add)

    for name, kind in KINDS.items():
        set_seed(toy.seed)
        base = AutoModelForCausalLM.from_config(tiny_config(toy, kind), attn_implementation="eager")
        rows, watch = toy.rows(toy.steps, toy.seed), watched(name, toy.steps)
        options = {"data_collator": default_data_collator, "callbacks": [watch]}
        Trainer(model=base, args=args, train_dataset=rows, **options).train()

    steps = toy.dense_steps + toy.sparse_steps
    model = copy_model(base, "packed", index_topk=toy.index_topk)
    right = eval_rows.accuracy(copy_model(model, "eager"), toy.beyond)
    watch = watched(PICKED, steps, toy.steps)
    curves[PICKED].append({"step": toy.steps, "accuracy": right})
    LongContextTrainer(
        model=model,
        args=replace(args, max_steps=steps, learning_rate=1e-3),
        train_dataset=toy.rows(steps, toy.seed + 1),
        data_collator=default_data_collator,
        callbacks=[watch],
        indexer=IndexerConfig(loss="dense", dense_steps=toy.dense_steps, indexer_learning_rate=1e-2),
    ).train()
    return curves


def draw(curves: dict[str, list[dict[str, float]]], toy: RecallArguments, path: Path) -> None:
    """The curves as a picture. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        panel.plot([point["step"] for point in curve], [point["accuracy"] for point in curve], label=name)
    panel.axhline(1 / toy.num_values, color="grey", linestyle=":", label="guess")
    panel.axvline(toy.steps + toy.dense_steps, color="grey", linewidth=0.5)
    panel.set(xlabel="step", ylabel=f"right, answer over {toy.beyond} tokens back", ylim=(0, 1.02))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    toy = parse_toy(RecallArguments, arguments)
    refuse_earlier_numbers(Path(toy.output_dir), NUMBERS_FILE)
    curves = compare(toy)
    folder, console, table = Path(toy.output_dir), Console(), Table("layers", "first point", "last point")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NUMBERS_FILE).write_text(json.dumps({"settings": vars(toy), "curves": curves}, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(curves, toy, folder / PICTURE_FILE)
    for name, curve in curves.items():
        table.add_row(name, *(f"{point['accuracy']:.1%}" for point in (curve[0], curve[-1])))
    console.print(table)
    console.print(f"Numbers: {folder / NUMBERS_FILE}", soft_wrap=True)

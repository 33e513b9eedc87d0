"""Does sleep think? A small hybrid learns rows whose answers need steps of thought over what it has forgotten.

    python recipes/sleep.py --config recipes/sleep_rule110_cpu.yaml

The same model is trained with each number of passes, on the same rows. Beside each curve stands what it must be
compared with: attention alone, which has forgotten the state and can only guess; one pass with as many times the
steps, which costs as much; and every trained model read with other passes than its own. What is counted are rows
of another seed, right in all of their answers.
"""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments, set_seed

from ..config.sleep import SleepConfig, SleepWarmup
from ..trainer.causal_lm import LongContextTrainer
from .muon_adamw import MuonAdamW
from .recall_rows import AtStep
from .recipe_file import parse_recipe, refuse_earlier_numbers
from .sleep_rows import DepoRows, Rule110Rows, SumRows, ThoughtRows


TASKS = ("rule110", "depo", "sums")
NUMBERS_FILE, PICTURE_FILE = "sleep.json", "sleep.png"


@dataclass
class SleepArguments:
    """Of the rows, the model and the runs."""

    task: str = field(default="rule110", metadata={"help": "Which rows: " + ", ".join(TASKS) + "."})
    difficulties: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8],
        metadata={"help": "Steps of the automaton, most hops, or tokens of noise: one family of curves each."},
    )
    num_bits: int = field(default=16, metadata={"help": "Rule 110: bits of a state, and tokens of a window."})
    num_states: int = field(default=1, metadata={"help": "Rule 110: states of a row."})
    asks_all: bool = field(default=True, metadata={"help": "Rule 110: all bits are asked for, or the first of each."})
    num_nodes: int = field(default=12, metadata={"help": "Depo: most nodes of a cycle."})
    num_questions: int = field(default=4, metadata={"help": "Depo: questions of a row."})
    window: int = field(default=16, metadata={"help": "Depo and sums: tokens after which a row is forgotten."})
    passes: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "One curve each."})
    equal_compute: bool = field(default=True, metadata={"help": "One pass with as many times the steps, too."})
    other_passes: bool = field(default=True, metadata={"help": "Read every model with other passes, too."})
    raise_passes_every: int = field(default=0, metadata={"help": "Steps after which one pass joins; 0: all at once."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A hybrid to start from; unset: a tiny one."}
    )
    hidden_size: int = field(default=64, metadata={"help": "Of the tiny model."})
    num_layers: int = field(default=2, metadata={"help": "Of it: attention and gated delta rule in turn."})
    state_heads: int = field(default=2, metadata={"help": "Of its gated delta rule."})
    muon_learning_rate: float = field(default=0.02, metadata={"help": "Of matrices of layers; the rest is AdamW's."})
    every: int = field(default=50, metadata={"help": "Steps between two points of a curve."})
    num_eval_rows: int = field(default=512, metadata={"help": "Rows that a point is measured on."})

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"`task` ({self.task!r}) must be one of {', '.join(TASKS)}.")

    def rows(self, num_rows: int, difficulty: int, seed: int) -> ThoughtRows:
        if self.task == "rule110":
            return Rule110Rows(num_rows, self.num_bits, difficulty, seed, self.num_states, self.asks_all)
        if self.task == "depo":
            return DepoRows(num_rows, self.num_nodes, difficulty, self.num_questions, self.window, seed)
        return SumRows(num_rows, difficulty, self.window, seed)


def tiny_model(toy: SleepArguments, vocab_size: int, kinds: tuple[str, str]) -> torch.nn.Module:
    """Layers of two kinds in turn, whose states decay slowly at the start."""
    heads = max(toy.hidden_size // 32, 1)
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=vocab_size,
        hidden_size=toy.hidden_size,
        intermediate_size=2 * toy.hidden_size,
        num_hidden_layers=toy.num_layers,
        layer_types=[kinds[index % 2] for index in range(toy.num_layers)],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        linear_num_key_heads=toy.state_heads,
        linear_num_value_heads=toy.state_heads,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        max_position_embeddings=4096,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(-4.0)  # as drawn, a fresh state forgets within tokens
    return model


class _Measured:
    """A model's curve: points of step, seconds of training, and what is right."""

    def __init__(self, toy: SleepArguments, rows: ThoughtRows, config: SleepConfig | None) -> None:
        self.toy, self.rows, self.config = toy, rows, config
        self.points: list[dict[str, float]] = []
        self.seconds, self.started = 0.0, time.process_time()

    def add(self, step: int, model) -> None:
        self.seconds += time.process_time() - self.started
        self.points.append({"step": step, "cpu_seconds": self.seconds, **measure(model, self.rows, self.config)})
        self.started = time.process_time()


@torch.no_grad()
def measure(model, rows: ThoughtRows, config: SleepConfig | None, batch_size: int = 128) -> dict[str, float]:
    """The share of rows that are right in all of their labels, and of right labels.

    Args:
        config ([`SleepConfig`], *optional*): unset: an ordinary forward, of a model that read the last window alone.
    """
    from ..sleep.loss import forward_rows
    from ..sleep.sleepers import sleeper_of

    was_training = model.training
    model.eval()
    exact, labels, count = 0.0, 0.0, 0
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        batch: dict[str, Any] = {
            "input_ids": rows.input_ids[part].to(device),
            "labels": rows.labels[part].to(device),
            **_chunks(rows.window),
        }
        if config is None:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        else:
            plain = type(model).forward.__get__(model)
            logits = forward_rows(sleeper_of(model, plain), batch, config, keeps_logits=True)[0].logits
        found = rows.right(logits.cpu(), part)
        size = len(batch["input_ids"])
        exact, labels, count = exact + found["exact"], labels + found["labels"] * size, count + size
    model.train(was_training)
    return {"exact": exact / count, "labels": labels / count}


def train_one(
    toy: SleepArguments, args: TrainingArguments, difficulty: int, passes: int, times: int = 1
) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """Train one model; `passes` 0 is attention alone."""
    steps = args.max_steps * times
    rows = toy.rows(steps * args.per_device_train_batch_size, difficulty, args.seed + 1)
    unseen = toy.rows(toy.num_eval_rows, difficulty, args.seed + 1_000_003)
    set_seed(args.seed)
    config: SleepConfig | None = None
    if passes == 0:
        # Keys are dropped at each border, so what is left of a row to attention is its last stretch.
        last = rows.input_ids.shape[1] - rows.input_ids.shape[1] // rows.window * rows.window
        start = rows.input_ids.shape[1] - last - (rows.window if last < rows.window // 2 else 0)
        for part in (rows, unseen):
            part.input_ids, part.labels = part.input_ids[:, start:], part.labels[:, start:]
        model = tiny_model(toy, rows.vocab_size, ("full_attention", "full_attention"))
    else:
        config = SleepConfig(window=rows.window, passes=passes, warmup=_warmup(toy, passes))
        model = _start_model(toy, rows.vocab_size)
    measured = _Measured(toy, unseen, None if config is None else replace(config, warmup=None))
    LongContextTrainer(
        model=model,
        args=replace(args, max_steps=steps, output_dir=str(Path(args.output_dir) / "runs")),
        train_dataset=rows,
        data_collator=_Collator(rows.window if config is not None else None),
        optimizers=(MuonAdamW(model, toy.muon_learning_rate, args.learning_rate), None),
        callbacks=[AtStep(range(toy.every * times, steps + 1, toy.every * times), measured.add)],
        sleep=config,
    ).train()
    return model, measured.points


def compare(toy: SleepArguments, args: TrainingArguments) -> dict[str, Any]:
    """All curves.

    Returns:
        From a name to its `points`, and to `read_with`: what the trained model gets right with other passes.
    """
    found: dict[str, Any] = {}
    contenders = [(passes, 1) for passes in toy.passes]
    if toy.equal_compute and len(toy.passes) > 1:
        contenders.append((1, max(toy.passes)))
    for difficulty in toy.difficulties:
        if toy.model_name_or_path is None:
            _, points = train_one(toy, args, difficulty, 0)
            found[f"{difficulty}: attention alone"] = {"points": points}
        for passes, times in contenders:
            model, points = train_one(toy, args, difficulty, passes, times)
            name = f"{difficulty}: N = {passes}" + (f", {times} x steps" if times > 1 else "")
            found[name] = {"points": points}
            if toy.other_passes and times == 1:
                unseen = toy.rows(toy.num_eval_rows, difficulty, args.seed + 1_000_003)
                found[name]["read_with"] = {
                    str(other): measure(model, unseen, SleepConfig(window=unseen.window, passes=other))["exact"]
                    for other in toy.passes
                }
            write(found, toy, args)
    return found


def write(found: dict[str, Any], toy: SleepArguments, args: TrainingArguments) -> Path:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run = {"steps": args.max_steps, "batch": args.per_device_train_batch_size, "learning_rate": args.learning_rate}
    path = folder / NUMBERS_FILE
    path.write_text(
        json.dumps({"settings": {**asdict(toy), **run, "seed": args.seed}, "curves": found}, indent=1) + "\n"
    )
    return path


def draw(found: dict[str, Any], toy: SleepArguments, path: Path) -> None:
    """Both axes: exact rows by steps (tokens), and by seconds of training. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (3.2 * len(toy.difficulties), 6)
    figure, panels = pyplot.subplots(2, len(toy.difficulties), figsize=size, sharey=True, squeeze=False)
    for column, difficulty in enumerate(toy.difficulties):
        for name, curve in found.items():
            of, label = name.split(": ", 1)
            if int(of) != difficulty:
                continue
            for row, axis in enumerate(("step", "cpu_seconds")):
                if row == 0 and "x steps" in label:
                    continue  # more tokens than this axis has
                xs, ys = ([point[key] for point in curve["points"]] for key in (axis, "exact"))
                panels[row, column].plot(xs, ys, label=label, linestyle=":" if "alone" in label else "-")
        panels[0, column].set(title=f"{toy.task}, {difficulty}", xlabel="step (equal tokens)", ylim=(-0.02, 1.02))
        panels[1, column].set(xlabel="CPU seconds of training")
    for row in panels:
        row[0].set_ylabel("exact rows, of another seed")
    panels[1, 0].legend(frameon=False, fontsize=7)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


ARGUMENTS = (SleepArguments, TrainingArguments)


def main() -> None:
    toy, args = parse_recipe(ARGUMENTS)
    refuse_earlier_numbers(Path(args.output_dir), NUMBERS_FILE)
    found = compare(toy, args)
    path, console, table = write(found, toy, args), Console(), Table("curve", "step", "CPU s", "exact", "answers")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(found, toy, path.parent / PICTURE_FILE)
    for name, curve in found.items():
        last = curve["points"][-1]
        cells = (f"{last['step']}", f"{last['cpu_seconds']:.0f}", f"{last['exact']:.3f}", f"{last['labels']:.3f}")
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"Numbers: {path}", soft_wrap=True)


class _Collator:
    """Stacks rows; a short window is not padded to a chunk of 64 tokens."""

    def __init__(self, window: int | None) -> None:
        self.window = window

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
        return {**batch, **(_chunks(self.window) if self.window is not None else {})}


def _chunks(window: int) -> dict[str, int]:
    return {"chunk_size": 16} if window <= 32 and not torch.cuda.is_available() else {}


def _warmup(toy: SleepArguments, passes: int) -> SleepWarmup | None:
    if not toy.raise_passes_every or passes == 1:
        return None
    return SleepWarmup(pass_steps=tuple(toy.raise_passes_every * number for number in range(1, passes)))


def _start_model(toy: SleepArguments, vocab_size: int) -> torch.nn.Module:
    if toy.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(toy.model_name_or_path)
    return tiny_model(toy, vocab_size, ("full_attention", "linear_attention"))

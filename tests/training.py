"""One training run described by plain values, so that it can be sent to any world and compared with one process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from hf_longctx import LongContextConfig, LongContextTrainer, MemoryConfig

from .models import VOCAB, build


class Rows(Dataset):
    """Random token rows with very uneven lengths and valid labels; every row depends on its index alone."""

    def __init__(self, count: int = 16, tokens: int = 21) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = []
        for index in range(count):
            length = 2 if index % 5 == 0 else tokens - index % 7
            ids = torch.randint(3, VOCAB, (length,), generator=generator)
            labels = ids.clone()
            if index % 3 == 1:
                labels[: length - 2] = -100
            self.rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class Stream(IterableDataset):
    """The same rows, one after the other."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows.rows)


def pad_right(rows: list[dict]) -> dict[str, torch.Tensor]:
    """The simplest collator: right padding with a mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        missing = longest - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * missing)
        batch["labels"].append(row["labels"] + [-100] * missing)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * missing)
    return {key: torch.tensor(value) for key, value in batch.items()}


def gloo_threads() -> int:
    """How many threads of this process serve gloo's process groups (Linux)."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("pt_gloo_runloop") for name in names)


DEFAULTS = {
    "use_cpu": True,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "max_steps": 4,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "max_grad_norm": 1.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "seed": 5,
}


def arguments(folder: str, **changes) -> TrainingArguments:
    return TrainingArguments(**{**DEFAULTS, "output_dir": folder, **changes})


def reset_state() -> None:
    """Forget the accelerator of an earlier run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(
    size: int,
    model="llama",
    prepare=None,
    after=None,
    rows=None,
    trainer_options=None,
    attention=None,
    context=None,
    memory=None,
    **changes,
):
    """Train and return (history, weights, extra). `size` 0 is the stock Trainer, the reference."""
    reset_state()
    stock = size == 0
    folder = changes.pop("output_dir", None) or tempfile.mkdtemp()
    resume = changes.pop("resume", None)
    if isinstance(model, str):
        model = build(model, attention or ("sdpa" if stock else "ulysses"))
    if prepare is not None:
        model = prepare(model)
    options = {"model": model, "args": arguments(folder, **changes), "train_dataset": rows or Rows()}
    options.update({"data_collator": pad_right, **(trainer_options or {})})
    if stock:
        trainer = Trainer(**options)
    else:
        long_context = LongContextConfig(sequence_parallel_size=size, **(context or {}))
        trainer = LongContextTrainer(**options, long_context=long_context, memory=MemoryConfig(**(memory or {})))
    extra = {}
    if isinstance(after, str) and after == "evaluate_first":
        extra["before"] = trainer.evaluate(options["eval_dataset"])
    trainer.train(resume_from_checkpoint=resume)
    if after == "evaluate":
        extra["after"] = trainer.evaluate()
    extra["wrapped"] = type(trainer.model_wrapped).__name__
    extra["total_train_batch_size"] = trainer.get_total_train_batch_size(trainer.args)
    extra["state"] = {
        "num_input_tokens_seen": trainer.state.num_input_tokens_seen,
        "epoch": trainer.state.epoch,
        "max_steps": trainer.state.max_steps,
        "global_step": trainer.state.global_step,
    }
    return trainer.state.log_history, weights_of(trainer), extra


def weights_of(trainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def steps(history: list[dict]) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def assert_same_trajectory(actual, expected, tolerance: float = 1e-5) -> None:
    """Losses, gradient norms and final weights agree; the learning rate moved the weights by far more than that."""
    ours, theirs = steps(actual[0]), steps(expected[0])
    assert len(ours) == len(theirs) >= 4, (ours, theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs)):
        for name, a, b in zip(("loss", "grad_norm"), mine, other):
            assert abs(a - b) <= tolerance * abs(b), f"step {step}: {name} {a!r} is not {b!r}\n{ours}\n{theirs}"
    for name, weight in expected[1].items():
        error = (actual[1][name] - weight).abs().max() / weight.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"
    assert abs(theirs[0][0] - theirs[-1][0]) > 1e-3, "the run did not learn anything to compare"

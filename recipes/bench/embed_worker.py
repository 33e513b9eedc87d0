"""One step of one way to train an embedder on real pairs, in a process of its own: seconds, memory, gradients."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from ulysses_worker import Meter


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hf_longctx import (
    LongContextSentenceTransformerTrainer,
    TextsConfig,
    TiledMultipleNegativesRankingLoss,
    pack_embeddings,
)
from hf_longctx.tasks.docstrings import FUNCTIONS, mine_functions


STOCK, PACKED, OURS = "padded, ST", "packed, ST's loss", "ours"
CACHED = ", cached"


def read_pairs(words: str, count: int) -> list[dict[str, str]]:
    """Pairs spread over all that are mined, the same in every process."""
    rows = list(mine_functions(words.removeprefix(FUNCTIONS)))
    if len(rows) < count:
        raise ValueError(f"`pairs` ({words}) has {len(rows)} pairs, but {count} are wanted: name more packages.")
    return rows[:: len(rows) // count][:count]


def build_step(settings: dict, rows: list[dict], folder: str) -> tuple[SentenceTransformer, Callable[[], float]]:
    """The model, and a function that runs forward and backward of the rows as a trainer does."""
    contender = settings["contender"]
    attention = "sdpa" if contender.startswith(STOCK) else "packed"
    model = SentenceTransformer(
        settings["model"], model_kwargs={"attn_implementation": attention}, device=settings["device"]
    )
    model.max_seq_length = settings["max_length"]
    for module in model.modules():  # so that gradients can be compared; both ways replay dropout otherwise
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    cached = settings["mini_batch_size"] if contender.endswith(CACHED) else None
    ours = contender.startswith(OURS)
    if ours:
        loss = TiledMultipleNegativesRankingLoss(model, mini_batch_size=cached)
    elif cached:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=cached)
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
    if contender.startswith(PACKED):
        pack_embeddings(model)
    args = SentenceTransformerTrainingArguments(
        output_dir=folder,
        use_cpu=settings["device"] == "cpu",
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=len(rows),
    )
    options = {"model": model, "args": args, "train_dataset": Dataset.from_list(rows), "loss": loss}
    if ours:
        texts = TextsConfig(overlong_texts="truncate")
        trainer = LongContextSentenceTransformerTrainer(**options, texts=texts)
    else:
        trainer = SentenceTransformerTrainer(**options)
    trainer.current_gradient_accumulation_steps = 1  # what `train` would set
    batch = trainer.data_collator(rows)
    tokens = sum(value.numel() for key, value in batch.items() if key.endswith("_input_ids"))
    settings["tokens"] = tokens
    return model, lambda: float(trainer.training_step(model.train(), dict(batch)))


def measure(settings: dict) -> dict:
    """A first step for memory and gradients, which are compared with padded ST's, then `steps` for the clock."""
    torch.manual_seed(0)
    torch.set_num_threads(settings["cores"])
    rows = read_pairs(settings["pairs"], settings["batch_size"])
    with tempfile.TemporaryDirectory() as folder:
        model, step = build_step(settings, rows, folder)
        meter = Meter(settings["device"])
        before = meter.memory()
        meter.reset_peak()
        loss = step()
        step_bytes = meter.peak() - before
        error = compare(model, loss, Path(settings["reference"]))
        model.zero_grad(set_to_none=True)
        runs = []
        for _ in range(settings["steps"]):
            meter.start()
            step()
            runs.append(meter.stop())
            model.zero_grad(set_to_none=True)
        return {"runs_of_steps": runs, "step_bytes": step_bytes, "loss": loss, **error} | {
            "tokens": settings["tokens"],
            "device_name": torch.cuda.get_device_name() if settings["device"] == "cuda" else "CPU",
            "load": os.getloadavg()[0],
        }


def compare(model: torch.nn.Module, loss: float, reference: Path) -> dict[str, float]:
    """Relative errors of the loss and of all gradients against `reference`, which is written if absent."""
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    if not reference.exists():
        torch.save({"loss": loss, "gradients": gradients}, reference)
        return {"loss_error": 0.0, "gradient_error": 0.0}
    expected = torch.load(reference, mmap=True, weights_only=True)
    squares = [
        ((g - expected["gradients"][n]).norm() ** 2, expected["gradients"][n].norm() ** 2)
        for n, g in gradients.items()
    ]
    difference, size = (float(sum(column)) for column in zip(*squares))
    return {"loss_error": abs(loss / expected["loss"] - 1), "gradient_error": (difference / size) ** 0.5}

"""`RunReport`: what a run leaves behind in addition to the model - numbers, a picture and a model card.

It reads the trainer's own logs and counters, and what [`ThroughputMeter`] adds to them. At the end it writes
`metrics.json`, `loss_and_throughput.png` and `README.md` into `output_dir`, on rank 0. It changes no number of the
run.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from .blend_report import sources_read
from .curves import draw_curves
from .launch_command import launch_command
from .meter import ThroughputMeter, cpu_memory, device_memory
from .model_card import write_model_card
from .origin import base_model_of, check_license, hub_datasets, license_of
from .redaction import redact_text
from .usage import config_of, kind_of


logger = logging.getLogger(__name__)

METRICS_FILE, PICTURE_FILE = "metrics.json", "loss_and_throughput.png"
_LIBRARIES = (
    "hf-longctx",
    "torch",
    "transformers",
    "accelerate",
    "trl",
    "peft",
    "sentence-transformers",
    "datasets",
    "tokenizers",
)


class RunReport(TrainerCallback):
    """Report on one training run.

    Args:
        sequence_parallel_size (`int`, *optional*, defaults to 1): processes that share a row.
        row_tokens (`int`, *optional*): longest row, in tokens: the context length that was trained.
        base_model (`str`, *optional*): name of the model that training started from; otherwise the model's own name.
            A folder is not shown; the card names the model that its files say it comes from.
        dataset (`str`, *optional*): name of the data.
        datasets (`Sequence[str]`, *optional*):
            Where the data comes from, for the card's `datasets`: names on the Hub, of which other places are left
            out; defaults to `dataset`.
        license (`str`, *optional*):
            Licence of the trained model, by its identifier on the Hub; defaults to that of the base model, where its
            card is known.

    Use [`RunReport.attach`] rather than `callbacks=[...]`: it brings a [`ThroughputMeter`], without which the report
    has no throughput.

    Raises:
        ValueError: `license` is no identifier on the Hub.

    Communication: one gather of a few numbers at the end of training, and the meter's; every rank must have the
    callback.
    """

    loss_unit: str | None = None  # from the trainer's arguments and the model

    def __init__(
        self,
        *,
        sequence_parallel_size: int = 1,
        row_tokens: int | None = None,
        base_model: str | None = None,
        dataset: str | None = None,
        datasets: Sequence[str] | None = None,
        license: str | None = None,
    ) -> None:
        check_license(license)
        self.sequence_parallel_size, self.row_tokens = sequence_parallel_size, row_tokens
        self.base_model, self.dataset = base_model, dataset
        self.datasets, self.license = datasets, license
        self.metrics: dict | None = None
        self._earlier_card: str | None = None

    def attach(self, trainer: Trainer) -> RunReport:
        """Add this report to `trainer`, and a meter in front of its callbacks unless it has one."""
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, self)
        if not any(isinstance(callback, ThroughputMeter) for callback in callbacks):
            ThroughputMeter().attach(trainer)
        return self

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        card = Path(args.output_dir, "README.md")
        self._earlier_card = (
            card.read_bytes().decode("utf-8", "surrogateescape")
            if state.is_world_process_zero and card.is_file()
            else None
        )

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        peak = {"rank": args.process_index, "cpu_bytes": cpu_memory(), "device_bytes": device_memory()}
        peaks = gather_object([peak])
        if not state.is_world_process_zero:
            return
        self.metrics = self._collect(args, state, peaks, model)
        self.write(args.output_dir)

    def write(self, folder: str | Path) -> None:
        """Write everything into `folder`; does nothing but on rank 0 and after training.

        Saving a model may replace our card with the trainer's, so call this again after `trainer.save_model()`.
        """
        if self.metrics is None:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS_FILE).write_text(json.dumps(self.metrics, indent=2) + "\n", encoding="utf-8")
        name, points = self._evaluations(self.metrics)
        unit = f"loss ({self.metrics['loss_unit']})"
        drawn = draw_curves(self.metrics, folder / PICTURE_FILE, unit, name, points)
        self._write_card(folder, self.metrics, PICTURE_FILE if drawn else None)

    def _evaluations(self, metrics: dict) -> tuple[str, list[tuple[int, float]]]:
        """What the orange curve shows, and its points."""
        return "evaluation", [(entry["step"], entry["eval_loss"]) for entry in metrics["eval_history"]]

    def _write_card(self, folder: Path, metrics: dict, picture: str | None) -> None:
        write_model_card(folder, metrics, picture, self._earlier_card)
        self._earlier_card = None  # kept once

    def _collect(self, args, state, peaks: list[dict], model) -> dict:
        history = [entry for entry in state.log_history if "loss" in entry]
        evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
        summary: dict = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
        keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second", "achieved_tflops", "mfu")
        data_parallel_size = args.world_size // self.sequence_parallel_size
        kind = kind_of(model)
        return {
            "name": (args.hub_model_id or Path(args.output_dir).resolve().name).split("/")[-1],
            "hub_model_id": args.hub_model_id,
            "command": launch_command(),
            **self._origin(model),
            **kind,
            "dataset": self.dataset and redact_text(_public(self.dataset)),
            "datasets": hub_datasets([self.dataset] if self.datasets is None else self.datasets),
            "loss_unit": self.loss_unit or _loss_unit(args, kind["pipeline_tag"]),
            "row_tokens": self.row_tokens,
            "world_size": args.world_size,
            "data_parallel_size": data_parallel_size,
            "sequence_parallel_size": self.sequence_parallel_size,
            "num_steps": state.global_step,
            "sources": sources_read(state),
            "settings": _settings(args, data_parallel_size, getattr(model, "dtype", None)),
            "versions": _versions(),
            "history": [{key: entry.get(key) for key in keys} for entry in history],
            "eval_history": [_evaluation(entry) for entry in evaluations],
            "train": {key: value for key, value in summary.items() if isinstance(value, (int, float))},
            "peak_memory": sorted(peaks, key=lambda peak: peak["rank"]),
            "fast_weights": getattr(getattr(model, "config", None), "ttt", None),
        }

    def _origin(self, model) -> dict:
        """What the model was before: in words, by its name on the Hub, and its licence."""
        place = getattr(config_of(model), "_name_or_path", None)
        place = place if isinstance(place, str) else None
        found = base_model_of(self.base_model or place)
        words = redact_text(_public(self.base_model)) if self.base_model else None
        license = {} if self.license else license_of(place or self.base_model, found)
        facts = {"license": license, "license_given": self.license}
        return {"base_model": found or words, "base_model_id": found, **facts}


def _evaluation(entry: dict[str, Any]) -> dict[str, Any]:
    """Of one evaluation: its loss, and what preference trainers say of rewards."""
    rewards = {key: value for key, value in entry.items() if key.startswith("eval_rewards/")}
    return {"step": entry["step"], "eval_loss": entry["eval_loss"], **rewards}


def _public(place: str) -> str:
    """The last part of a path, whose other parts are of this machine; a name as it is."""
    is_path = os.path.isabs(place) or os.path.exists(place)
    return Path(place).resolve().name if is_path else place


def _loss_unit(args, task: str | None) -> str:
    """What the loss is divided by."""
    kinds = {kind.__name__ for kind in type(args).__mro__}
    if kinds & {"DPOConfig", "RewardConfig"}:
        return "nats per pair"
    return "nats per row" if "KTOConfig" in kinds or task == "text-classification" else "nats per token"


def _settings(args, data_parallel_size: int, dtype: torch.dtype | None) -> dict[str, object]:
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * data_parallel_size
    return {
        "rows_per_optimizer_step": rows,
        "learning_rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "weights": str(dtype).removeprefix("torch."),
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        "activation_checkpointing": bool(args.gradient_checkpointing),  # the name that older transformers know too
        "seed": args.seed,
    }


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

"""The YAML file of a run that `hf-longctx plan` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from ..planner.settings import GIB
from .plan_report import Cell


_ACCELERATE = {"ddp": "ddp_1node", "fsdp2": "fsdp2_8gpu"}
_DATA = "dataset_name: documents  # <- a folder of documents, a jsonl or parquet file, or a data set on the Hub"
_DATA_PAIRS = "dataset_name: pairs.jsonl  # <- rows with `prompt`, `chosen` and `rejected`, or a data set on the Hub"


def write_recipe(path: Path, model: str, cell: Cell, target: int | None, task: str = "sft") -> None:
    """The YAML that `hf-longctx` takes for a task, with the settings of `cell` and the tokens that were asked for."""
    settings = cell.settings
    precision = str(settings.weights_dtype).removeprefix("torch.")
    values: dict[str, object] = {
        "max_length": target or max(cell.longest // 1024 * 1024, min(cell.longest, 1024)),
        "sequence_parallel_size": cell.size,
        "memory": cell.preset.name,
        "dtype": precision,
        "bf16": settings.compute_dtype == torch.bfloat16,
        "gradient_checkpointing": settings.checkpointing,
        "per_device_train_batch_size": settings.rows // 2 if settings.whole_rows else settings.rows,
    }
    if task == "dpo" and settings.reference == "none":
        values["precompute_ref_log_probs"] = True
    if settings.checkpointing:
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False, "offload": settings.offload}
    if settings.optimizer == "lora":
        values |= {"use_peft": True, "lora_r": settings.lora_rank, "lora_target_modules": "all-linear"}
        values["lora_dropout"] = 0.0
    elif settings.optimizer != "adamw":
        values["optim"] = settings.optimizer
    launch = ""
    if settings.wrapper in _ACCELERATE:
        launch = f" --accelerate_config {_ACCELERATE[settings.wrapper]} --num_processes {settings.world_size}"
    needed = yaml.safe_dump({"model_name_or_path": model}).strip()
    breakdown: Any = cell.breakdown  # of a row that fits
    lines = [
        f"# Planned: {breakdown.device / GIB:.1f} GiB of each of {settings.world_size} GPUs for rows of "
        f"{breakdown.tokens:,} tokens; {cell.longest:,} would fit.",
        f"#   hf-longctx {task} --config {path.name}{launch}",
        "",
        f"{needed}  # <- a model on the Hub, or a folder",
        _DATA_PAIRS if settings.whole_rows else _DATA,
        "output_dir: runs/planned  # <- a new folder",
        "",
        yaml.safe_dump(values, sort_keys=False),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")

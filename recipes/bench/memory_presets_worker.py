"""One memory preset in processes of its own: `LongContextTrainer` takes a short step, then the measured one.

Started by `memory_presets.py`, alone or once per rank by torchrun. It reads its settings from one JSON argument, and
rank 0 writes its numbers to `result`. The short step warms up and makes the optimizer's state; the measured one is a
whole step of the trainer: forward, backward, clipping, optimizer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback, TrainingArguments
from ulysses_worker import Meter

from hf_longctx import LongContextConfig, LongContextTrainer, LSHConfig, MemoryConfig, end_training, tie_query_key


WARM_UP_TOKENS = 512


class LongTrainer(LongContextTrainer):
    """Rows in the order in which they are given: the short one first."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class MeasureSecondStep(TrainerCallback):
    """Clock and memory of the second step, without the time in which its row is collated."""

    def __init__(self, device: str) -> None:
        self.meter, self.numbers = Meter(device), {}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            self.numbers["before_bytes"] = self.meter.memory()
            self.meter.reset_peak()
            self.meter.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            self.numbers |= {**self.meter.stop(), "peak_bytes": self.meter.peak()}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def measure(settings: dict) -> dict:
    torch.manual_seed(0)
    config = LlamaConfig(**settings["shape"], max_position_embeddings=settings["tokens"], use_cache=False)
    dtype = getattr(torch, settings["dtype"])
    with torch.device(settings["device"]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="ulysses")
    if settings["reversible_lsh"]:
        tie_query_key(model)
    generator = torch.Generator().manual_seed(1)
    lengths = (WARM_UP_TOKENS, settings["tokens"])
    rows = [{"input_ids": torch.randint(config.vocab_size, (n,), generator=generator)} for n in lengths]
    callback = MeasureSecondStep(settings["device"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=settings["device"] == "cpu",
            dataloader_pin_memory=settings["device"] != "cpu",
        )
        trainer = LongTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[callback],
            long_context=LongContextConfig(
                sequence_parallel_size=settings["ranks"],
                inner_attention="lsh" if settings["reversible_lsh"] else "auto",
            ),
            memory=MemoryConfig(memory=settings["memory"], reversible_layers=settings["reversible_lsh"]),
        )
        trainer.train()
    step = next(entry for entry in trainer.state.log_history if entry.get("step") == 2)
    every = [callback.numbers]
    if settings["ranks"] > 1:
        every = [None] * settings["ranks"]
        dist.all_gather_object(every, callback.numbers)
    end_training(trainer)
    facts = plan(config, settings) if settings["plan"] else {}
    return {
        **facts,
        "seconds": max(r["seconds"] for r in every),
        "cpu_seconds": sum(r["cpu_seconds"] for r in every),
        "machine_cpu_seconds": max(r["machine_cpu_seconds"] for r in every),
        "step_bytes": max(r["peak_bytes"] - r["before_bytes"] for r in every),
        "peak_bytes": max(r["peak_bytes"] for r in every),
        "device_name": torch.cuda.get_device_name() if settings["device"] == "cuda" else "CPU",
        "loss": step["loss"],
        "gradient_norm": step["grad_norm"],
    }


def plan(config: LlamaConfig, settings: dict) -> dict[str, int]:
    """What the planner says that a step takes beyond weights and optimizer, and what it says of these."""
    from hf_longctx.planner.memory_plan import Planner
    from hf_longctx.planner.settings import Settings

    dtype, planner = getattr(torch, settings["dtype"]), Planner(config)
    plain = Settings(
        tokens=settings["tokens"],
        weights_dtype=dtype,
        compute_dtype=dtype,
        on_gpu=settings["device"] == "cuda",
        reversible=settings["reversible_lsh"],
        num_hashes=LSHConfig().num_hashes if settings["reversible_lsh"] else None,
    )
    breakdown = planner.breakdown(planner.preset(settings["memory"], plain))
    states = breakdown.weights + breakdown.optimizer
    return {"planned_bytes": breakdown.device - states, "planned_states": states}


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    result = measure(settings)
    if int(os.environ.get("RANK", 0)) == 0:
        Path(settings["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()

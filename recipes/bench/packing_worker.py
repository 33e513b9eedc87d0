"""One variant of the packing benchmark, in a process of its own: build, check, then a measurement for every line read.

Started by `packing.py` with its settings as one JSON argument. It reads commands from its standard input, `check` or
`measure`, answers each with one line, and sleeps in between, so that variants can take turns without starting anew.

A measurement is forward and backward of all batches of the variant, one after another; gradients add up, as they do
over accumulation steps. Peak memory is the process's largest resident set since the measurement began (on CUDA: the
allocator's peak); what the process held with the model built is reported next to it.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from ulysses_worker import Meter


ANSWER = "answer: "  # what else a library prints is no answer


class Worker:
    """The model of one variant and its batches.

    Args:
        settings (`dict`): `shape`, `attention`, `device`, `dtype`, the file `batches` with those to `check` and those
            to `measure`, and the file `reference` of the first variant's gradients.
    """

    def __init__(self, settings: dict) -> None:
        if settings["attention"] == "packed":
            import hf_longctx  # noqa: F401  registers the name

        self.settings, self.meter = settings, Meter(settings["device"])
        before = self.meter.memory() if self.meter.cuda else 0  # what other variants in this process hold
        torch.manual_seed(0)  # the same random weights in every process
        config = LlamaConfig(**settings["shape"], tie_word_embeddings=True, use_cache=False)
        with torch.device(settings["device"]):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, settings["dtype"]), attn_implementation=settings["attention"]
            )
        self.model.train()
        batches = torch.load(settings["batches"], weights_only=True)
        self.batches = {name: [self._to_device(batch) for batch in part] for name, part in batches.items()}
        self.model_bytes = self.meter.memory() - before

    def check(self) -> dict:
        """Loss and gradients of a small batch against those of the first variant; also the warm-up."""
        self.model.zero_grad(set_to_none=True)
        loss = self._step(self.batches["check"][0]).item()
        gradients = {name: p.grad.cpu() for name, p in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        facts = {"loss": loss, "parameters": sum(p.numel() for p in self.model.parameters())}
        if not os.path.exists(self.settings["reference"]):
            torch.save({"loss": loss, "gradients": gradients}, self.settings["reference"])
            return facts
        expected = torch.load(self.settings["reference"], mmap=True, weights_only=True)
        errors = {name: _error(gradients[name], theirs) for name, theirs in expected["gradients"].items()}
        worst = max(errors, key=errors.get)
        loss_error = abs(loss / expected["loss"] - 1)
        return {**facts, "loss_error": loss_error, "gradient_error": errors[worst], "worst_gradient": worst}

    def measure(self) -> dict:
        """Forward and backward of all batches: seconds, memory, and the mean loss over all trained tokens."""
        self.model.zero_grad(set_to_none=True)
        others = self.meter.memory() - self.model_bytes if self.meter.cuda else 0
        self.meter.reset_peak()
        self.meter.start()
        losses = [self._step(batch) for batch in self.batches["measure"]]
        numbers = self.meter.stop()
        self.model.zero_grad(set_to_none=True)
        trained = [int((batch["labels"][:, 1:] != -100).sum()) for batch in self.batches["measure"]]
        return {
            **numbers,
            "loss": sum(loss.item() * count for loss, count in zip(losses, trained)) / sum(trained),
            "peak_bytes": self.meter.peak() - others,
            "model_bytes": self.model_bytes,
            "device_name": torch.cuda.get_device_name() if self.meter.cuda else "CPU",
        }

    def _step(self, batch: dict) -> torch.Tensor:
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def _to_device(self, batch: dict) -> dict:
        device = self.settings["device"]
        return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry.

    Single entries have no relative accuracy of their own: one near zero is what is left of large terms that cancel.
    """
    return ((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    worker = Worker(settings)
    commands = {"check": worker.check, "measure": worker.measure}
    for line in sys.stdin:
        print(ANSWER + json.dumps(commands[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()

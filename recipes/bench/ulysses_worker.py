"""One contender of the Ulysses benchmark, in a process of its own: build, warm up, one measured step, compare.

Started by `ulysses.py`, alone or once per rank by torchrun, with the Python of the contender's own environment; so it
imports nothing but torch, transformers and the contender. It reads its settings from one JSON argument, and rank 0
writes its numbers to `result`.

A step is what a training loop does with one full row: cut it, forward with the causal loss, backward. Gradients are
then averaged over ranks, as a wrapper would, outside the timed part. Peak memory is the process's largest resident set
during the step (on CUDA: the allocator's peak); what it held before, with the model built, is reported next to it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig


WARM_UP_FRACTION = 8  # the warm-up row is this much shorter: it starts threads, connections and caches
CLOCK_TICKS = 100  # /proc/stat counts hundredths of a second


def build_model(settings: dict) -> torch.nn.Module:
    """The same random Llama for every contender: seeded and drawn on the device of the run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **settings["shape"], max_position_embeddings=settings["tokens"], tie_word_embeddings=True, use_cache=False
    )
    with torch.device(settings["device"]):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
        )
    return model.train()


def save_memory(model: torch.nn.Module, settings: dict) -> None:
    """What long rows need, for every contender alike, so that attention is all that differs."""
    if settings["checkpointing"]:
        from hf_longctx.planner.simulate import enable_checkpointing

        enable_checkpointing(model, {"use_reentrant": False})
    if settings["tiled_loss"]:
        from hf_longctx.adapters.tiled_loss import tile_loss

        tile_loss(model)


def make_batch(settings: dict, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(settings["shape"]["vocab_size"], (1, tokens), generator=generator).to(settings["device"])
    return {"input_ids": ids, "labels": ids.clone()}


def stock_loss(model, settings: dict) -> Callable:
    """One process, transformers' own kernel."""
    model.set_attn_implementation(settings["kernel"])
    return lambda batch: model(**batch).loss


def ulysses_loss(model, settings: dict) -> Callable:
    """`attn_implementation="ulysses"` as in a plain loop of the user's own."""
    from hf_longctx import SequenceMesh, adapt, shard_batch

    model.set_attn_implementation("ulysses")
    mesh = SequenceMesh.build(settings["ranks"])
    adapt(model, mesh, inner_attention=settings["kernel"])
    return lambda batch: model(**shard_batch(batch, mesh, model)).loss


def packed_loss(model, settings: dict) -> Callable:
    """`attn_implementation="packed"` on whole rows; the wrapped kernel is `settings["kernel"]`."""
    from hf_longctx import SequenceMesh, adapt

    model.set_attn_implementation("packed")
    adapt(model, SequenceMesh.build(), inner_attention=settings["kernel"])
    return lambda batch: model(**batch).loss


def ringmaster_loss(model, settings: dict) -> Callable:
    """axolotl-ringmaster's Ulysses as in its README's raw loop."""
    import ringmaster
    from ringmaster.adapters.raw import context_parallel_region

    runtime = ringmaster.setup(
        ringmaster.RingmasterConfig(
            size=settings["ranks"],
            backend=ringmaster.Backend.ULYSSES,
            ulysses_size=settings["ranks"],
            ring_size=1,
        ),
        num_kv_heads=settings["shape"]["num_key_value_heads"],
        device_type=settings["device"],
        inner_attn=settings["kernel"],
    )
    model.set_attn_implementation(runtime.attn_implementation)

    def loss(batch):
        with context_parallel_region(dict(batch)) as share:
            return model(**share).loss

    return loss


CONTENDERS = {
    "stock": stock_loss,
    "ulysses": ulysses_loss,
    "packed": packed_loss,
    "ringmaster": ringmaster_loss,
}


class Meter:
    """Clocks and memory of this process on the device of the run."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def memory(self) -> int:
        """Bytes held now."""
        if self.cuda:
            return torch.cuda.memory_allocated()
        return _status_bytes("VmRSS") or _max_resident_bytes()

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident high-water mark starts anew

    def peak(self) -> int:
        """Most bytes held since `reset_peak`."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return _status_bytes("VmHWM") or _max_resident_bytes()

    def start(self) -> None:
        self.busy_start = _machine_busy_seconds()
        self.cpu_start, self.start_time = time.process_time(), time.perf_counter()
        if self.cuda:
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()

    def stop(self) -> dict[str, float]:
        """Since `start`: seconds of the clock (on CUDA: of the stream), of this process's threads, of all programs."""
        if self.cuda:
            self.events[1].record()
            torch.cuda.synchronize()
        times = {
            "seconds": time.perf_counter() - self.start_time,
            "cpu_seconds": time.process_time() - self.cpu_start,
            "machine_cpu_seconds": _machine_busy_seconds() - self.busy_start,
        }
        if self.cuda:
            times["seconds"] = self.events[0].elapsed_time(self.events[1]) / 1000
        return times


def _status_bytes(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _machine_busy_seconds() -> float:
    """CPU seconds of every program since boot, to tell how quiet the machine was; 0 where it is not known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / CLOCK_TICKS


def _max_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(settings: dict) -> dict:
    """Warm up on a shorter row, then one step on the full row, with its clocks and memory."""
    ranks, meter = settings["ranks"], Meter(settings["device"])
    model = build_model(settings)
    loss_of = CONTENDERS[settings["contender"]](model, settings)
    save_memory(model, settings)
    batch = make_batch(settings, settings["tokens"])
    model_memory = meter.memory()
    few = make_batch(settings, settings["tokens"] // WARM_UP_FRACTION)
    facts = {}
    if settings["utilization"]:
        from utilization import utilization

        step = (lambda: loss_of(few).backward()) if settings["profile"] else None
        facts = utilization(model.config, settings["tokens"], step)
    loss_of(few).backward()
    model.zero_grad(set_to_none=True)
    if ranks > 1:
        dist.barrier()
    meter.reset_peak()
    meter.start()
    loss = loss_of(batch)
    loss.backward()
    mine = {**meter.stop(), "peak": meter.peak(), "model_memory": model_memory}
    loss = loss.detach().double()
    start = time.perf_counter()
    if ranks > 1:
        for tensor in (loss, *(p.grad for p in model.parameters())):
            dist.all_reduce(tensor)
            tensor /= ranks
    mean_seconds = time.perf_counter() - start
    every = [mine]
    if ranks > 1:
        every = [None] * ranks
        dist.all_gather_object(every, mine)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    compared = gradients if settings["compare_gradients"] else {}
    return {
        "seconds": max(r["seconds"] for r in every),
        "cpu_seconds": sum(r["cpu_seconds"] for r in every),
        "machine_cpu_seconds": max(r["machine_cpu_seconds"] for r in every),
        "peak_bytes": [r["peak"] for r in every],
        "model_bytes": [r["model_memory"] for r in every],
        "gradient_mean_seconds": mean_seconds,
        "device_name": torch.cuda.get_device_name() if meter.cuda else "CPU",
        **facts,
        **compare(loss.item(), gradients, compared, settings["reference"]),
    }


def compare(
    loss: float, gradients: dict[str, torch.Tensor], compared: dict[str, torch.Tensor], reference: str
) -> dict:
    """Relative errors of loss, gradient norm and worst gradient against `reference`, which is written if absent.

    Single gradients are those of `compared`, all or none of them.
    """
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
    facts = {"loss": loss, "gradient_norm": norm}
    if int(os.environ.get("RANK", 0)):
        return facts
    if not os.path.exists(reference):
        torch.save({**facts, "gradients": {name: g.cpu() for name, g in compared.items()}}, reference)
        return facts
    expected = torch.load(reference, mmap=True, weights_only=True)
    errors = {}
    for name, theirs in expected["gradients"].items():
        theirs = theirs.to(gradients[name].device).double()
        errors[name] = ((gradients[name].double() - theirs).norm() / theirs.norm()).item()
    facts |= {
        "loss_error": abs(loss / expected["loss"] - 1),
        "gradient_norm_error": abs(norm / expected["gradient_norm"] - 1),
    }
    if errors:
        worst = max(errors, key=errors.get)
        facts |= {"gradient_error": errors[worst], "worst_gradient": worst}
    return facts


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    if settings["device"] == "cuda":
        torch.cuda.set_device(local_rank)
    if settings["ranks"] > 1:
        dist.init_process_group("nccl" if settings["device"] == "cuda" else "gloo")
    result = measure(settings)
    if rank == 0:
        Path(settings["result"]).write_text(json.dumps(result))
    if settings["ranks"] > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

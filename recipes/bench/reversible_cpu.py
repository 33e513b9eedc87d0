"""What reversible layers hold between forward and backward, and what they cost, by depth.

What: forward and backward of a small Llama's layers on one row: two streams under plain autograd, one stream under
activation checkpointing, and reversible layers.

How: gradients of reversible layers must be those of plain autograd to the bit, or nothing is printed. *Held* counts
the storages that forward made and that are alive when it is over, without its output; *peak* is the most
during the whole step, with the gradients of the weights and without these. Price: a minute or two of one core.

    python recipes/bench/reversible_cpu.py --output docs/benchmarks/reversible_cpu.md
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from page import Page, add_medians, add_ratios, describe_run, device_of, fill, finish, quietness
from rich.console import Console
from transformers import LlamaConfig, LlamaModel
from ulysses_worker import Meter

from hf_longctx import make_reversible
from hf_longctx.adapters import reversible
from hf_longctx.planner.tracker import StorageTracker


VARIANTS = ("two streams, autograd", "one stream, checkpointing", "reversible")
COLUMNS = {
    "layers": "{layers}",
    "variant": "{label}",
    "held MiB": lambda row: f"{row['held_bytes'] / 2**20:.2f}",
    "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:.2f}",
    "s": "{seconds:.3f}",
    "CPU time": lambda row: f"{row['cpu_seconds_ratio']:.2f}" if row.get("cpu_seconds_ratio") else "",
    "gradients": "{equal}",
    "others": "{other_load:.0%}",
}
READING = """\
- *held*: between forward and backward. Two streams of float64 hold 16 bytes a number of a token with any number of
  layers, and as many again in backward for their gradients; a checkpoint holds 4 bytes a layer in float32, 2 in
  bfloat16. So reversible layers hold less than checkpoints from 5 layers on, or from 9 in bfloat16.
- *CPU time*: ratio to plain autograd over the same two streams. Recomputing is one unit on top of three; the rest is
  the streams in float64.
- *gradients*: whether all of them equal those of plain autograd over two streams to the bit. The model with
  checkpointing is another one, so its are not compared.
- When not to use it: on weights that were trained in one stream, and on shallow models.
"""
console = Console(width=max(Console().width, 120))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the table shows their median")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    return parser.parse_args(arguments)


def build(args: argparse.Namespace, layers: int, variant: str) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, args.hidden // 32),
        max_position_embeddings=args.tokens,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaModel(config).to(args.device, getattr(torch, args.dtype)).train()
    if variant == VARIANTS[1]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        make_reversible(model)
    return model


def by_autograd(calls: list, hidden_states: torch.Tensor) -> torch.Tensor:
    """Two streams as anyone would write them."""
    one = two = hidden_states.double()
    for call in calls:
        given = call.args, call.kwargs
        one = one + call.halves.run(0, call.layer, call.own, two.to(hidden_states.dtype), *given).double()
        two = two + call.halves.run(1, call.layer, call.own, one.to(hidden_states.dtype), *given).double()
    return ((one + two) * 0.5).to(hidden_states.dtype)


class Step:
    """Forward and backward of one variant."""

    def __init__(self, args: argparse.Namespace, layers: int, variant: str) -> None:
        self.model, self.variant, self.device = build(args, layers, variant), variant, args.device
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 256, (1, args.tokens), generator=generator).to(args.device)
        shape = 1, args.tokens, args.hidden
        self.upstream = torch.randn(shape, generator=generator).to(args.device, getattr(torch, args.dtype))

    def forward(self) -> torch.Tensor:
        ours = reversible.run_two_streams
        if self.variant == VARIANTS[0]:
            reversible.run_two_streams = by_autograd
        try:
            return self.model(input_ids=self.ids, use_cache=False).last_hidden_state
        finally:
            reversible.run_two_streams = ours

    def gradients(self) -> list[torch.Tensor]:
        self.model.zero_grad(set_to_none=True)
        self.forward().backward(self.upstream)
        return [p.grad for p in self.model.parameters()]

    def bytes(self) -> dict[str, float]:
        """Held between forward and backward, and the most of a step."""
        self.model.zero_grad(set_to_none=True)
        tracker = StorageTracker()
        tracker.mark([*self.model.parameters(), *self.model.buffers()], "weights")
        with tracker:
            output = self.forward()
            held = sum(tracker.live.values()) - tracker.live["weights"] - output.untyped_storage().nbytes()
            output.backward(self.upstream)
        peak = max(sum(kinds.values()) - kinds["weights"] for kinds in tracker.peaks.values())
        return {"held_bytes": held, "peak_bytes": peak}

    def time(self) -> dict:
        meter = Meter(self.device)
        meter.start()
        self.gradients()
        name = torch.cuda.get_device_name() if meter.cuda else "CPU"
        return {**meter.stop(), "device_name": name}


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    return Page(
        title=f"Reversible layers on {device_of(result)}",
        intro=[
            f"Forward and backward of a Llama of hidden size {settings['hidden']} on one row of "
            f"{settings['tokens']:,} tokens, {settings['dtype']} layers, one thread."
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[quietness(result, "*s*")],
        reading=READING,
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(1)
    rows = []
    for layers in args.depths:
        steps = {variant: Step(args, layers, variant) for variant in VARIANTS}
        expected = steps[VARIANTS[0]].gradients()
        unequal = sum(not torch.equal(a, b) for a, b in zip(steps[VARIANTS[2]].gradients(), expected))
        if unequal:
            raise RuntimeError(f"{unequal} of {len(expected)} gradients differ at {layers} layers: nothing is timed")
        group = [{"layers": layers, "label": label, "runs": [], **step.bytes()} for label, step in steps.items()]
        for _ in range(args.repeats):
            for row, step in zip(group, steps.values()):
                row["runs"].append(step.time())
        for row in group:
            add_medians(row, row["runs"], os.cpu_count() or 1)
            add_ratios(row, group[0], ("cpu_seconds",))
        group[2]["equal"] = f"{len(expected)}/{len(expected)}"
        rows += group
        console.print(f"{layers} layers: {group[2]['cpu_seconds_ratio']:.2f} x plain", highlight=False)
    result = describe_run("reversible_cpu", arguments, args, ("hf-longctx", "torch", "transformers"), rows)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

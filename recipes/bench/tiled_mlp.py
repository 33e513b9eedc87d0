"""Seconds and memory of one gated MLP on a long row: whole, and in tiles; with and without activation checkpointing.

What: forward and backward of one decoder layer's MLP of a Llama with random weights, gradients of inputs and weights.
With checkpointing the MLP ends its checkpoint as it ends a layer, so the tiles' own forward is the only second one.

How: every measurement is a fresh process that warms up on one tile; variants take turns within a round, and their
gradients must be equal. *Working set* is the high-water mark of the step less what was held before and less what any
variant must hold: output and gradients. Price: on 2 cores, some 8 minutes and 4 GB at the defaults.

    python recipes/bench/tiled_mlp.py --output docs/benchmarks/tiled_mlp_cpu.md
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from page import Page, add_medians, describe_run, device_of, fill, finish, quietness
from processes import run_worker
from rich.console import Console
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig
from ulysses_worker import Meter

from hf_longctx.adapters.tiled_mlp import tile_mlp


# (label, tiled, checkpointed); the first of each kind is what the second is compared with.
VARIANTS = (
    ("whole", False, False),
    ("tiles", True, False),
    ("whole, checkpointed", False, True),
    ("tiles, checkpointed", True, True),
)
TOLERANCE = 2e-6  # float32: gradients of weights are summed tile by tile, so in another order
COLUMNS = {
    "variant": "{label}",
    "s": "{seconds:.2f}",
    "CPU s": "{cpu_seconds:.2f}",
    "time": "{time:.2f}",
    "CPU time": "{cpu_time:.2f}",
    "step GB": lambda row: f"{row['step_bytes'] / 1e9:.2f}",
    "working set GB": lambda row: f"{row['working_bytes'] / 1e9:.3f}",
    "cut": "{cut:.1f}",
    "gradient error": "{error:.0e}",
    "others": "{other_load:.0%}",
}
READING = """\
- *time*, *CPU time*, *cut*: ratios to the whole MLP with the same checkpointing.
- *working set*: the most memory of the step beyond inputs, output and gradients, which every variant holds.
- *gradient error*: the worst of inputs and weights against the whole MLP, relative to its norm.
- A whole MLP does three units of work (forward, and two products a weight in backward), tiles four. Beside
  checkpointing both do four.
"""
console = Console(width=max(Console().width, 130))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--tile_size", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the table shows their median")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(settings: dict) -> dict:
    """One step of one variant in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(settings["cores"])
    config = LlamaConfig(
        hidden_size=settings["hidden"],
        intermediate_size=settings["intermediate"],
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=64,
    )
    model = AutoModelForCausalLM.from_config(config).to(settings["device"]).train()
    if settings["tiled"]:
        tile_mlp(model, settings["tile_size"])
    mlp = model.model.layers[0].mlp
    for parameter in mlp.parameters():
        parameter.data.normal_(std=settings["hidden"] ** -0.5)

    def step(hidden: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        output = checkpoint(mlp, hidden, use_reentrant=False) if settings["checkpointed"] else mlp(hidden)
        output.backward(upstream)
        return output.detach()

    def draw(tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, settings["hidden"], device=settings["device"])

    step(draw(settings["tile_size"]).requires_grad_(), draw(settings["tile_size"]))
    mlp.zero_grad(set_to_none=True)
    hidden, upstream = draw(settings["tokens"]).requires_grad_(), draw(settings["tokens"])
    meter = Meter(settings["device"])
    before = meter.memory()
    meter.reset_peak()
    meter.start()
    output = step(hidden, upstream)
    numbers, peak = meter.stop(), meter.peak()
    gradients = {"hidden": hidden.grad, **{name: p.grad for name, p in mlp.named_parameters()}}
    held = sum(x.numel() * x.element_size() for x in (output, *gradients.values()))
    error = 0.0
    if os.path.exists(settings["reference"]):
        expected = torch.load(settings["reference"], mmap=True, weights_only=True)
        error = max(((g.cpu() - expected[n]).norm() / expected[n].norm()).item() for n, g in gradients.items())
    else:
        torch.save({n: g.cpu() for n, g in gradients.items()}, settings["reference"])
    name = torch.cuda.get_device_name() if meter.cuda else "CPU"
    step_bytes = peak - before
    return {
        **numbers,
        "step_bytes": step_bytes,
        "working_bytes": step_bytes - held,
        "error": error,
        "device_name": name,
    }


def run_once(variant: tuple, args: argparse.Namespace, folder: Path) -> dict:
    settings = {
        name: getattr(args, name) for name in ("tokens", "tile_size", "hidden", "intermediate", "device", "cores")
    }
    settings |= {"tiled": variant[1], "checkpointed": variant[2], "reference": str(folder / "gradients.pt")}
    return run_worker(__file__, settings, args.cores, variant[0])


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians, and ratios to the whole MLP of the same kind."""
    for row in rows:
        add_medians(row, row["runs"], cores, ("step_bytes", "working_bytes"))
        row["error"] = max(run["error"] for run in row["runs"])
        whole = next(other for other in rows if other["checkpointed"] == row["checkpointed"])
        row["time"], row["cpu_time"] = (row[key] / whole[key] for key in ("seconds", "cpu_seconds"))
        row["cut"] = whole["working_bytes"] / row["working_bytes"]


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    return Page(
        title=f"An MLP in tiles on {device_of(result)}",
        intro=[
            f"Forward and backward of one gated MLP, hidden size {settings['hidden']}, width "
            f"{settings['intermediate']}, on a row of {settings['tokens']:,} tokens in tiles of "
            f"{settings['tile_size']:,}, float32."
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[quietness(result, "*s* and *time*")],
        reading=READING,
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    rows = [{"label": v[0], "tiled": v[1], "checkpointed": v[2], "runs": []} for v in VARIANTS]
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.repeats):
            for variant, row in zip(VARIANTS, rows):
                run = run_once(variant, args, Path(folder))
                if not run["error"] <= TOLERANCE:
                    raise RuntimeError(f"{variant[0]} is wrong, so its speed does not matter: {run['error']:.1e}")
                row["runs"].append(run)
                console.print(f"round {index + 1}: {variant[0]}: {run['seconds']:.2f} s", highlight=False)
    summarize(rows, args.cores)
    result = describe_run("tiled_mlp", arguments, args, ("hf-longctx", "torch", "transformers"), rows)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

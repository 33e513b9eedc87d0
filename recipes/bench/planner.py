"""How good the memory planner is: the planned peak of a training step next to the one that a process really had.

What: three shapes of models (Llama; Qwen3 with grouped heads and a large tied vocabulary; GPT-2 with biases, dropout
and fused projections), each at two lengths and with every preset of `memory` that a CPU has, with AdamW in fp32. The
plan is made from the configuration alone, before anything runs.

How: each measurement is a process of its own (`hf_longctx/planner/measure.py`) that loads its libraries, warms up,
builds the model and takes two steps; measured is the largest resident set during the second less what the process held
before there was a model. `max` differs from `checkpoint` on a GPU only and is left out. Memory does not depend on how
busy the machine is. Price: some 15 minutes on 2 cores, and 5 GB.

    python recipes/bench/planner.py --output docs/benchmarks/planner_cpu.md
    python recipes/bench/planner.py --shapes gpt2 --presets off loss
    python recipes/bench/planner.py --device cuda --shapes 1b --output docs/benchmarks/planner_cuda.md
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from page import describe_run, finish
from planner_report import describe, page_of
from processes import add_one_process, in_one_process, measure_here
from rich.console import Console
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from hf_longctx.planner.measure import can_measure, free_bytes, measure, measure_in_process
from hf_longctx.planner.memory_plan import Planner
from hf_longctx.planner.presets import PRESETS
from hf_longctx.planner.settings import Settings


console = Console(width=max(Console().width, 120))
KEPT_ON_DEVICE = [name for name, preset in PRESETS.items() if not preset.offload]
# Of the loss and of the MLPs: short next to a row, so that tiles are what is measured.
TILE_TOKENS = 128
_SMALL = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 8192}
SHAPES: dict[str, tuple[PretrainedConfig, tuple[int, ...]]] = {
    "llama": (
        LlamaConfig(**_SMALL, vocab_size=32_000, intermediate_size=1408, num_hidden_layers=4, num_key_value_heads=8),
        (512, 1536),
    ),
    "qwen3": (
        Qwen3Config(
            **_SMALL,
            vocab_size=151_936,
            intermediate_size=1536,
            num_hidden_layers=2,
            num_key_value_heads=4,
            head_dim=128,
            tie_word_embeddings=True,
        ),
        (512, 1024),
    ),
    "gpt2": (
        # Without attention dropout, under which torch's CPU kernels keep `T x T` weights.
        GPT2Config(n_embd=512, n_layer=4, n_head=8, n_positions=8192, vocab_size=50_257, attn_pdrop=0.0),
        (512, 1536),
    ),
    "1b": (
        # Llama 3.2's.
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=2**19,
            tie_word_embeddings=True,
        ),
        (8192, 16384),
    ),
}
BY_DEFAULT = ["llama", "qwen3", "gpt2"]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=BY_DEFAULT, metavar="SHAPE")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, metavar="PRESET")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_one_process(parser)
    parser.add_argument("--tokens", nargs="+", type=int, help="lengths of a row; two for each shape unless given")
    parser.add_argument("--optimizer", choices=("adamw", "adafactor", "sgd"), default="adamw")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds until a measurement is given up")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written next to it")
    args = parser.parse_args(arguments)
    args.presets = args.presets or (KEPT_ON_DEVICE if args.device == "cpu" else list(PRESETS))
    if not can_measure(args.device):
        remedy = "run this under Linux" if args.device == "cpu" else "there is no CUDA device; pass `--device cpu`"
        raise RuntimeError(f"this system does not tell what a step held at most: {remedy}.")
    return args


def measure_cell(name: str, tokens: int, preset: str, planner: Planner, args: argparse.Namespace) -> dict:
    """Plan and measure one step."""
    on_gpu = args.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    plain = {"weights_dtype": dtype, "compute_dtype": dtype, "optimizer": args.optimizer, "on_gpu": on_gpu}
    settings = planner.preset(preset, Settings(tokens=tokens, **plain))
    tiles = {key: TILE_TOKENS for key in ("loss_tile_size", "mlp_tile_size") if getattr(settings, key) is not None}
    settings = settings.of(**tiles)
    start = time.perf_counter()
    breakdown = planner.breakdown(settings)
    seconds = time.perf_counter() - start
    if breakdown.device > 0.9 * free_bytes(args.device):
        raise RuntimeError(
            f"'{name}' with {tokens} tokens needs {breakdown.device / 2**30:.1f} GiB: give fewer tokens."
        )
    if in_one_process(args):
        run = measure_here(lambda question: {"bytes": measure(planner.config, settings, args.device)}, {})
        if "failed" in run:
            raise RuntimeError(f"'{name}' with {tokens} tokens and '{preset}': {run['failed']}")
        measured = run["bytes"]
    else:
        measured = measure_in_process(planner.config, settings, args.device, timeout=args.timeout)
    states = breakdown.weights + breakdown.gradients + breakdown.optimizer
    row = {"shape": name, "tokens": tokens, "preset": preset, "planned": breakdown.device, "measured": measured}
    row |= {"states": states, "phase": breakdown.phase, "planning_seconds": seconds}
    row["error"] = breakdown.device / measured - 1
    return row


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    result = describe_run("planner", arguments, args, ("hf-longctx", "torch", "transformers"), [])
    result["machine"]["threads"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    result |= {"settings": {"optimizer": args.optimizer, "tile_tokens": TILE_TOKENS}, "shapes": {}}
    if args.device == "cuda":
        result["settings"]["device"] = args.device
        result["machine"]["device"] = torch.cuda.get_device_name()
    for name in args.shapes:
        config, lengths = SHAPES[name]
        planner = Planner(config)
        result["shapes"][name] = describe(config, sum(p.numel() for p in planner.model.parameters()))
        for tokens in args.tokens or lengths:
            for preset in args.presets:
                row = measure_cell(name, tokens, preset, planner, args)
                result["rows"].append(row)
                console.print(
                    f"{name}, {tokens:,} tokens, {preset}: planned {row['planned'] / 2**20:,.0f} MiB, measured "
                    f"{row['measured'] / 2**20:,.0f} MiB, {row['error']:+.1%}"
                )
        if args.output:
            # After every shape, so that a run that is stopped has something to show.
            page_of(result).write(result, args.output)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

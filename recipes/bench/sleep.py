"""What sleep costs, and what it does not: steps, prompts and tokens of a hybrid with 1, 2 and 4 passes.

What: a tiny Qwen3.5 text model (attention and gated delta rule in turn). A training step over a row of windows that
sleep and one that is awake; a prompt of as many windows; tokens that are generated behind it, and behind a prompt four
times as long; a training step on short windows, which transformers' delta rule pads to a chunk of 64 tokens, and the
same with `chunk_size=16`.

How: with one pass, the loss must be that of the unmodified model with its own cache, keys dropped at each border, to
the bit. Every measurement runs once to warm up, then some times; a row is the median. Price: on one thread a minute.

    python recipes/bench/sleep.py --output docs/benchmarks/sleep_cpu.md
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from page import describe_run, finish
from rich.console import Console
from sleep_report import page_of, summarize
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from ulysses_worker import Meter

from hf_longctx import SleepConfig
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.sleep.generate import Dreamer
from hf_longctx.sleep.loss import forward_rows
from hf_longctx.sleep.sleepers import check_sleeper


KINDS = {
    "step": "training step",
    "prompt": "prompt",
    "token": "token behind it",
    "token_far": "token behind four times the prompt",
    "short": "step, windows of 16",
    "short_chunks": "step, windows of 16, chunks of 16",
}
console = Console(width=max(Console().width, 130))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--windows", type=int, default=7, help="of a row, that sleep")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="that are generated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="the table shows their median")
    parser.add_argument("--one_process", action="store_true", help="as is always done here")
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    return parser.parse_args(arguments)


def build(args: argparse.Namespace) -> torch.nn.Module:
    heads = max(args.hidden // 64, 1)
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        layer_types=["full_attention", "linear_attention"] * (args.layers // 2),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=32,
        linear_value_head_dim=64,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(args.device)


def batch_of(args: argparse.Namespace, window: int, windows: int) -> dict:
    """Four rows, whose last window has labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(512, (4, window * (windows + 1)), generator=generator).to(args.device)
    labels = ids.clone()
    labels[:, : window * windows + 1] = -100
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def check(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """With one pass, logits are those of the model with its own cache and keys dropped, to the bit."""
    model.eval()
    batch, config = batch_of(args, args.window, 2), SleepConfig(window=args.window)
    ours = forward_rows(check_sleeper(model, config), batch, config, keeps_logits=True)[0].logits
    cache = DynamicCache(config=model.config)
    for start in range(0, 3 * args.window, args.window):
        part = slice(start, start + args.window)
        positions = torch.arange(part.start, part.stop, device=args.device)[None]
        inputs = {"input_ids": batch["input_ids"][:, part], "position_ids": positions, OUTPUT_NAME: cache}
        theirs = model(**inputs, use_cache=True).logits
        for layer in cache.layers:
            if hasattr(layer, "keys"):
                layer.keys, layer.values, layer.is_initialized = None, None, False
    if ours is None or not torch.equal(ours[:, -args.window :], theirs):
        raise RuntimeError("one pass is not the unmodified model, so its speed does not matter")


def measure(model: torch.nn.Module, kind: str, passes: int, args: argparse.Namespace) -> dict:
    """One measurement."""
    meter = Meter(args.device)
    if kind in ("step", "short", "short_chunks"):
        window = 16 if kind != "step" else args.window
        batch, config = batch_of(args, window, args.windows), SleepConfig(window=window, passes=passes)
        batch |= {"chunk_size": 16} if kind == "short_chunks" else {}
        model.train()
        meter.start()
        output, cache = forward_rows(check_sleeper(model, config), batch, config)
        output.loss.backward()
        found = meter.stop()
        model.zero_grad(set_to_none=True)
        return {**found, "peak_keys": cache.peak_keys}
    model.eval()
    config = SleepConfig(window=args.window, passes=passes)
    ids = batch_of(args, args.window, args.windows * (4 if kind == "token_far" else 1))["input_ids"]
    dreamer = Dreamer(check_sleeper(model, config), config)
    with torch.no_grad():
        if kind == "prompt":
            meter.start()
            dreamer.read_prompt(ids[:, : args.window * args.windows + 1])
            found = meter.stop()
        else:
            dreamer.read_prompt(ids[:, : -args.window + 1])
            meter.start()
            for _ in range(args.tokens):
                dreamer.wake()
                dreamer.read(ids[:, :1])
            found = meter.stop()
    return {**found, "peak_keys": dreamer.cache.peak_keys}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.cores)
    model = build(args)
    check(model, args)
    rows = [
        {"label": label, "kind": kind, "passes": passes, "runs": []}
        for kind, label in KINDS.items()
        for passes in args.passes
    ]
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    for index in range(args.repeats + 1):
        for row in rows:
            run = measure(model, row["kind"], row["passes"], args)
            if index:
                row["runs"].append({**run, "device_name": name})
    summarize(rows, os.cpu_count() or 1)
    result = describe_run("sleep", arguments, args, ("hf-longctx", "torch", "transformers"), rows)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

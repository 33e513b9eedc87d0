"""What learning while reading costs: a training step against one of full attention, and reading by the token.

What: one training step (forward and backward) of a Llama with random weights on one row: as it is, with a window in
chunks and no inner steps, with inner steps (E2E), with first-order ones, and recomputed with one level and with two.
Then reading with a cache, short and long, and reading on after each: the same cost a token, and a cache of one size.

How: contenders take turns in one process, on one thread where the device is a CPU; the table shows medians. Before,
losses of those that must be equal are compared. Price: about 5 CPU minutes at the defaults.

    python recipes/bench/ttt.py --output docs/benchmarks/ttt_cpu.md
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from page import add_medians, add_ratios, describe_run, finish
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from ttt_report import page_of
from ulysses_worker import Meter

from hf_longctx import TTTConfig, TTTForCausalLM
from hf_longctx.ttt import fast_model


FULL, WINDOW, E2E, FIRST = "full attention", "window, in chunks", "E2E", "E2E, first order"
ONE, TWO = "E2E, recomputed, one level", "E2E, recomputed, two levels"
LEVELS = {ONE: 1, TWO: 2}
READ, READ_ON = "reading", "reading on, after"
console = Console(width=max(Console().width, 130))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="of the row of a step")
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 128], help="tokens of a chunk")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--read", type=int, nargs="+", default=[1024, 16384], help="tokens that are read")
    parser.add_argument("--more", type=int, default=2048, help="tokens that are read after those")
    parser.add_argument("--layers", type=int, default=4, help="a quarter of them has fast weights")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the table shows their median")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    return parser.parse_args(arguments)


def build(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    heads = max(args.hidden // 64, 1)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(*args.tokens, *args.read) + args.more,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(args.device)


def contender(args: argparse.Namespace, label: str, chunk: int) -> Any:
    """A model in training mode."""
    base = build(args)
    if label == FULL:
        return base.train()
    base.set_attn_implementation("packed")
    settings = TTTConfig(
        window=args.window,
        chunk_tokens=chunk,
        suffix_layers=max(1, args.layers // 4),
        fast_intermediate_size=args.intermediate,
        inner_learning_rate=0.0 if label == WINDOW else 1.0,
        meta_gradient="first_order" if label == FIRST else "exact",
    )
    torch.manual_seed(1)
    model = TTTForCausalLM.from_base(base, settings).train()
    if label in LEVELS:
        model.gradient_checkpointing = True
    return model


def step(model: Any, ids: torch.Tensor, label: str) -> float:
    """One forward and backward; the loss."""
    before, fast_model.recomputation_levels = fast_model.recomputation_levels, lambda chunks: LEVELS.get(label, 0)
    try:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    finally:
        fast_model.recomputation_levels = before
    return float(loss.detach())


def timed(work: Callable[[], object], device: str) -> dict:
    """Seconds of the clock, of this process and of the machine, and the peak on a GPU."""
    meter = Meter(device)
    before = meter.memory()
    meter.reset_peak()
    meter.start()
    work()
    run = meter.stop()
    peak = max(meter.peak() - before, 0) / 1e6
    return {**run, "peak_mb": peak, "device_name": torch.cuda.get_device_name() if meter.cuda else "CPU"}


def training_rows(args: argparse.Namespace) -> list[dict]:
    """Every contender at every length and chunk; full attention once a length."""
    rows, models = [], {}
    for tokens in args.tokens:
        for chunk in args.chunks:
            labels = (FULL, WINDOW, E2E, FIRST, ONE, TWO) if chunk == args.chunks[0] else (WINDOW, E2E, ONE, TWO)
            for label in labels:
                rows.append({"label": label, "tokens": tokens, "chunk": "" if label == FULL else chunk, "runs": []})
                models[label, chunk] = contender(args, label, chunk)
        ids = torch.randint(args.vocab, (1, tokens), generator=torch.Generator().manual_seed(2)).to(args.device)
        here = [row for row in rows if row["tokens"] == tokens]
        for row in here:
            key = row["label"], row["chunk"] or args.chunks[0]
            row["loss"] = step(models[key], ids, row["label"])
        validate(here)
        for index in range(args.repeats):
            for row in here:
                key = row["label"], row["chunk"] or args.chunks[0]
                row["runs"].append(timed(partial(step, models[key], ids, row["label"]), args.device))
            console.print(f"round {index + 1} of {tokens:,} tokens", highlight=False)
        for row in here:
            _summarize(row, args.cores)
        for row in here:
            add_ratios(row, here[0])
    return rows


def validate(rows: list[dict]) -> None:
    """Recomputed and first-order steps have the loss of E2E, or their speed does not matter."""
    for row in rows:
        same = [other for other in rows if other["label"] == E2E and other["chunk"] == row["chunk"]]
        if row["label"] in (FIRST, ONE, TWO) and abs(row["loss"] - same[0]["loss"]) > 1e-4:
            raise RuntimeError(f"{row['label']}: loss {row['loss']:.6f} instead of {same[0]['loss']:.6f}")


def reading_rows(args: argparse.Namespace) -> list[dict]:
    """Reading by the token, the size of what is left, and reading on from there."""
    model, rows = contender(args, E2E, args.chunks[-1]).eval(), []
    for tokens in args.read:
        ids = torch.randint(args.vocab, (1, tokens + args.more), generator=torch.Generator().manual_seed(3))
        begin, more = ids.to(args.device).split([tokens, args.more], 1)
        first = {"label": READ, "tokens": tokens, "chunk": args.chunks[-1], "runs": []}
        then = {"label": READ_ON, "tokens": tokens, "chunk": args.chunks[-1], "runs": []}
        caches: list = []
        for _ in range(args.repeats):
            first["runs"].append(
                timed(lambda begin=begin, caches=caches: caches.append(model.read(begin)), args.device)
            )
            then["runs"].append(timed(partial(model.read, more, caches[-1].copy()), args.device))
        first["cache_mb"] = caches[-1].nbytes / 1e6
        for row, count in ((first, tokens), (then, args.more)):
            _summarize(row, args.cores)
            row["token_us"] = (row["seconds"] if args.device == "cuda" else row["cpu_seconds"]) / count * 1e6
            rows.append({**row, "read": count})
    for row in rows:
        shortest = next(other for other in rows if other["label"] == row["label"])
        for key in ("seconds", "cpu_seconds"):
            if shortest[key]:
                row[f"{key}_ratio"] = row[key] / row["read"] / (shortest[key] / shortest["read"])
    return rows


def _summarize(row: dict, cores: int) -> None:
    add_medians(row, row["runs"], cores, ("peak_mb",))


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows = [*training_rows(args), *reading_rows(args)]
    result = describe_run("ttt", arguments, args, ("hf-longctx", "torch", "transformers"), rows)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

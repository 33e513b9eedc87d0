"""Seconds and memory of DeepSeek-V4's sparse attention: transformers' dense bias against blocks of gathered keys.

What: forward and backward of one compressed sparse and one heavily compressed layer with random weights, without
experts and streams, on one row of one document.

How: every measurement is a fresh process that warms up on a short row; outputs and gradients of both must be equal.
*Peak* is the high-water mark of the step less what was held before it, in a process of its own that gives freed memory
back at once. Price: on one thread some 3 minutes and 3 GB.

    python recipes/bench/sparse_attention.py --output docs/benchmarks/sparse_attention_cpu.md
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from page import Page, add_medians, add_ratios, describe_run, device_of, fill, finish, quietness
from processes import add_one_process, in_one_process, measure_here, run_worker
from rich.console import Console
from transformers import AutoConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4PreTrainedModel,
    DeepseekV4RotaryEmbedding,
)
from ulysses_worker import Meter

from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.attention.cache_names import OUTPUT_NAME


VARIANTS = (("transformers, eager", "eager"), ('ours, "packed"', "packed"))
# float32, in blocks of queries and so in another order; where two scores are that close, another entry is picked.
TOLERANCE = 1e-4
WARM_UP = 256
COLUMNS = {
    "tokens": "{tokens:,}",
    "variant": "{label}",
    "s": "{seconds:.2f}",
    "CPU s": "{cpu_seconds:.2f}",
    "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:,.0f}",
    "CPU time": lambda row: f"{row['cpu_seconds_ratio']:.2f}" if row.get("cpu_seconds_ratio") else "",
    "peak": lambda row: f"{row['peak_bytes_ratio']:.3f}" if row.get("peak_bytes_ratio") else "",
    "error": "{error:.0e}",
    "others": "{other_load:.0%}",
}
READING = """\
- *CPU time*, *peak*: ratios to transformers' eager attention on the same row.
- *error*: the worst of the output and the gradients of inputs and attention against it, relative to the largest entry;
  of rows that it was run on.
- transformers makes scores of all queries with all tokens and entries, and those of the indexer's heads; both are
  quadratic in the row. Here a block of queries meets its window and the entries that it may see, and is computed again
  in the backward.
- When not to use it: rows below a thousand tokens, where the dense bias is small.
"""
console = Console(width=max(Console().width, 130))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--eager_up_to", type=int, default=4096, help="longest row of transformers' attention")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_size", type=int, default=32)
    parser.add_argument("--topk", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="rounds; the table shows their median")
    add_one_process(parser)
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class AttentionLayers(DeepseekV4PreTrainedModel):
    """The attention layers of a configuration, one after the other, and nothing else."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleList(DeepseekV4Attention(config, i) for i in range(config.num_hidden_layers))
        self.rotary_emb = DeepseekV4RotaryEmbedding(config)
        self.post_init()

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        turns = {kind: self.rotary_emb(inputs_embeds, positions, layer_type=kind) for kind in ("main", "compress")}
        facts = {"attention_mask": None, "position_ids": positions}
        mask = create_sliding_window_causal_mask(self.config, inputs_embeds, **facts, **{OUTPUT_NAME: None})
        for layer in self.layers:
            output, _ = layer(inputs_embeds, turns, positions, mask)
            inputs_embeds = inputs_embeds + output
        return inputs_embeds


def build(settings: dict) -> torch.nn.Module:
    """Two layers whose weights make attention uneven."""
    config = AutoConfig.for_model(
        "deepseek_v4",
        vocab_size=256,
        hidden_size=settings["heads"] * settings["head_size"],
        num_hidden_layers=2,
        num_attention_heads=settings["heads"],
        head_dim=settings["head_size"],
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        sliding_window=128,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        index_topk=settings["topk"],
        index_n_heads=16,
        index_head_dim=settings["head_size"],
        attn_implementation=settings["attention"],
    )
    torch.manual_seed(0)
    model = AttentionLayers(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.1)
    return model.to(settings["device"]).train()


def measure(settings: dict) -> dict:
    """One step of one variant in this process."""
    torch.set_num_threads(settings["cores"])
    model = build(settings)
    if settings["attention"] != "eager":
        attach_adapters(model)
    width = settings["heads"] * settings["head_size"]

    def draw(tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randn(1, tokens, width, generator=generator).to(settings["device"])

    def step(embeddings: torch.Tensor) -> torch.Tensor:
        output = model(embeddings)
        output.backward(draw(embeddings.shape[1]))
        return output.detach()

    step(draw(min(WARM_UP, settings["tokens"])))
    model.zero_grad(set_to_none=True)
    embeddings = draw(settings["tokens"]).requires_grad_()
    meter = Meter(settings["device"])
    before = meter.memory()
    meter.reset_peak()
    meter.start()
    output = step(embeddings)
    numbers, peak = meter.stop(), meter.peak()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {"output": output, "embeddings": embeddings.grad}
    error, path = 0.0, Path(settings["reference"])
    if path.exists():
        expected = torch.load(path, weights_only=True)
        error = max(worst_of(x.cpu(), expected.get(name)) for name, x in found.items())
    elif settings["attention"] == "eager":
        torch.save({name: x.cpu() for name, x in found.items()}, path)
    name = torch.cuda.get_device_name() if meter.cuda else "CPU"
    return {**numbers, "peak_bytes": peak - before, "error": error, "device_name": name}


def worst_of(actual: torch.Tensor, expected: torch.Tensor | None) -> float:
    """Relative to the largest entry; what transformers has no gradient of, since no window is whole, must be zero."""
    if expected is None:
        return 0.0 if not actual.any() else float("inf")
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def run_once(row: dict, args: argparse.Namespace, folder: Path) -> dict:
    names = ("heads", "head_size", "topk", "device", "cores")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"tokens": row["tokens"], "attention": row["attention"]}
    settings["reference"] = str(folder / f"{row['tokens']}.pt")
    if in_one_process(args):
        run = measure_here(measure, settings)
        if "failed" in run:
            raise RuntimeError(f"{row['label']} failed on {row['tokens']:,} tokens: {run['failed']}")
        return run
    run = run_worker(__file__, settings, args.cores, row["label"])
    again = run_worker(__file__, settings, args.cores, row["label"], gives_back=True)  # which takes time of its own
    return {**run, "peak_bytes": again["peak_bytes"]}


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings = result["settings"]
    return Page(
        title=f"Sparse attention of DeepSeek-V4 on {device_of(result)}",
        intro=[
            f"Forward and backward of one compressed sparse layer (windows of 4 tokens, {settings['topk']} picked), "
            f"one heavily compressed layer (windows of 128), {settings['heads']} heads of {settings['head_size']}, "
            f"a window of 128 tokens, {settings['cores']} thread(s), float32."
        ],
        headers=list(COLUMNS),
        cells=[fill(COLUMNS, row) for row in result["rows"]],
        notes=[quietness(result, "*s*")],
        reading=READING,
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    rows = [
        {"tokens": tokens, "label": label, "attention": attention, "runs": []}
        for tokens in args.tokens
        for label, attention in VARIANTS
        if attention != "eager" or tokens <= args.eager_up_to
    ]
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.repeats):
            for row in rows:
                run = run_once(row, args, Path(folder))
                if not run["error"] <= TOLERANCE:
                    raise RuntimeError(f"{row['label']} is wrong, so its speed does not matter: {run['error']:.1e}")
                row["runs"].append(run)
                where = f"round {index + 1}: {row['tokens']:,} tokens, {row['label']}"
                console.print(f"{where}: {run['cpu_seconds']:.2f} CPU s", highlight=False)
    for row in rows:
        add_medians(row, row["runs"], os.cpu_count() or 1, ("peak_bytes",))
        row["error"] = max(run["error"] for run in row["runs"])
        eager = next((r for r in rows if r["tokens"] == row["tokens"] and r["attention"] == "eager"), None)
        if eager is not None and eager is not row:
            add_ratios(row, eager, ("cpu_seconds", "peak_bytes"))
    result = describe_run("sparse_attention", arguments, args, ("hf-longctx", "torch", "transformers"), rows)
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

"""One step of an encoder on ragged texts, padded and packed: MiniLM's and ModernBERT-base's shapes, random weights.

What: forward, mean pooling, in-batch negatives and backward of pairs of random tokens; (a) padded to the longest text
with `sdpa`, (b) the same with `flash_attention_2` where it is installed, (c) as one flat row with
`attn_implementation="packed"`, which is what `pack_embeddings` runs. transformers alone, no sentence-transformers, so
it also runs where that is missing or older than this project supports; the page then says so.

How: loss and all gradients of each must equal those of (a) before anything is timed, with dropout off. In float32 on a
CPU, in bfloat16 on CUDA. Price: seconds on CUDA; a minute on 2 cores at the defaults.

    python recipes/bench/embed_shapes.py --device cuda --output docs/benchmarks/embed_shapes_cuda.md
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

import torch
from page import Page, add_medians, add_ratios, bullets, describe_run, device_of, fail, fill, finish, quietness
from processes import measure_here
from rich.console import Console
from transformers import AutoModel, BertConfig, ModernBertConfig, PretrainedConfig
from ulysses_worker import Meter
from versions import what_is_missing

from hf_longctx import PackingCollator
from hf_longctx.losses.contrastive import contrastive_loss
from hf_longctx.parallel.pooling import Spans, pool_spans


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHAPES: dict[str, PretrainedConfig] = {
    "MiniLM": BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, **_NO_DROPOUT
    ),
    "ModernBERT-base": ModernBertConfig(),
    "tiny": BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        **_NO_DROPOUT,
    ),
}
# Lengths are lognormal, like those of questions and passages: many short texts, few of the greatest length.
MEDIAN_TOKENS, DEVIATION_LOG, SHORTEST = 90, 0.8, 4
# Relative to the norm of a parameter's gradient. bfloat16 keeps 8 bits, and rows of another form round elsewhere.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-3}
NEEDS = {"sentence-transformers": "6.2"}
COLUMNS = {
    "shape": "{shape}",
    "contender": "{label}",
    "tokens in the step": "{tokens:,}",
    "s": "{seconds:.3f}",
    "speed-up": "{speed_up:.2f}",
    "step MB": lambda row: f"{row['step_bytes'] / 1e6:,.0f}",
    "gradient error": "{gradient_error:.0e}",
    "others": "{other_load:.0%}",
}
READING = """\
- *tokens in the step*: what the model computes, padding included.
- *s*: forward and backward of the step, median. *speed-up*: to the padded step with `sdpa`.
- *step MB*: the most memory of a step beyond what was held before it, gradients included.
- *gradient error*: all gradients against those of the padded step, relative to their norm.
"""
WHEN_NOT = """\
- Texts of one length have no padding, so there is nothing to gain.
"""
console = Console(width=max(Console().width, 120))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["MiniLM", "ModernBERT-base"], metavar="SHAPE")
    parser.add_argument("--pairs", type=int, help="of a step (CPU: 16; CUDA: 256)")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="steps; the table shows their median")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="a Markdown result; a .json is written next to it")
    args = parser.parse_args(arguments)
    args.pairs = args.pairs or (16 if args.device == "cpu" else 256)
    args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    args.one_process = True
    return args


def draw_texts(pairs: int, max_length: int, vocab: int) -> list[dict[str, list[int]]]:
    """Queries, then positives, as token ids; id 0 is left for padding."""
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(2 * pairs, generator=generator) * DEVIATION_LOG
    lengths = (MEDIAN_TOKENS * logs.exp()).long().clamp(SHORTEST, max_length).tolist()
    return [{"input_ids": torch.randint(1, vocab, (n,), generator=generator).tolist()} for n in lengths]


def embed_padded(model: torch.nn.Module, texts: list[dict], device: str) -> tuple[torch.Tensor, int]:
    """Means of the hidden states, `(n, D)`, and the tokens that were computed."""
    longest = max(len(text["input_ids"]) for text in texts)
    ids = torch.tensor([text["input_ids"] + [0] * (longest - len(text["input_ids"])) for text in texts], device=device)
    mask = (ids != 0).long()
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True), ids.numel()


def embed_packed(model: torch.nn.Module, texts: list[dict], device: str) -> tuple[torch.Tensor, int]:
    """The same from one flat row."""
    row = PackingCollator(mask_first_label=False)([{**text, "labels": text["input_ids"]} for text in texts])
    row = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in row.items() if k != "labels"}
    hidden = model(**row).last_hidden_state[0]
    (means,) = pool_spans(hidden, Spans.of_documents(row["cu_seq_lens_q"]), ("mean",))
    return means.float(), hidden.shape[0]


def measure(settings: dict) -> dict:
    """A first step for memory and gradients, which are compared with the first contender's; then those to time."""
    config, device, reference = settings["config"], settings["device"], settings["reference"]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(
            config, dtype=getattr(torch, settings["dtype"]), attn_implementation=settings["attention"]
        ).train()
    texts = draw_texts(settings["pairs"], settings["max_length"], config.vocab_size)
    embed = embed_packed if settings["attention"] == "packed" else embed_padded

    def step() -> tuple[torch.Tensor, int]:
        model.zero_grad(set_to_none=True)
        vectors, tokens = embed(model, texts, device)
        loss = contrastive_loss(vectors.chunk(2))
        loss.backward()
        return loss.detach(), tokens

    meter = Meter(device)
    before = meter.memory()
    meter.reset_peak()
    loss, tokens = step()
    facts = {"step_bytes": meter.peak() - before, "tokens": tokens, "loss": loss.item(), "gradient_error": 0.0}
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    if not reference:
        reference |= {"gradients": gradients}
    else:
        pairs = [(gradients[name], theirs) for name, theirs in reference["gradients"].items()]
        difference, size = (
            sum(float(x.norm()) ** 2 for x in xs) for xs in ([a - b for a, b in pairs], gradients.values())
        )
        facts["gradient_error"] = (difference / size) ** 0.5
    runs = []
    for _ in range(settings["repeats"]):
        meter.start()
        step()
        runs.append({**meter.stop(), "device_name": torch.cuda.get_device_name() if meter.cuda else "CPU"})
    return {**facts, "runs": runs}


def list_contenders() -> list[tuple[str, str]]:
    """(label, attention); the first is the reference."""
    flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    padded = [("padded, sdpa", "sdpa"), *([("padded, flash_attention_2", "flash_attention_2")] if flash else [])]
    return [*padded, ('ours, "packed"', "packed")]


def measure_all(args: argparse.Namespace) -> list[dict]:
    rows = []
    for shape in args.shapes:
        reference: dict = {}
        for label, attention in list_contenders():
            names = ("pairs", "max_length", "repeats", "device", "dtype")
            settings = {name: getattr(args, name) for name in names} | {"config": SHAPES[shape]}
            run = measure_here(measure, settings | {"attention": attention, "reference": reference})
            if "failed" not in run and not run["gradient_error"] <= TOLERANCE[args.dtype]:
                run = {"failed": f"wrong, so its speed does not matter: gradients off by {run['gradient_error']:.1e}"}
            rows.append({"shape": shape, "label": label, "runs": [], "failed": None, **run})
            shown = run.get("failed") or f"{run['runs'][-1]['seconds']:.3f} s"
            console.print(f"{shape}: {label}: {shown}", highlight=False)
    return rows


def summarize(rows: list[dict], cores: int) -> None:
    """Add medians, and the speed-up to the padded step of the same shape."""
    references = {}
    for row in rows:
        if row["failed"]:
            continue
        add_medians(row, row["runs"], cores)
        reference = references.setdefault(row["shape"], row)
        add_ratios(row, reference, ("seconds", "step_bytes"))
        row["speed_up"] = reference["seconds"] / row["seconds"]


def page_of(result: dict) -> Page:
    """The page of a run."""
    settings, rows = result["settings"], result["rows"]
    return Page(
        title=f"One step of an encoder on {device_of(result)}: padded and packed",
        intro=[
            f"{settings['pairs']} pairs of random tokens, lengths lognormal with median {MEDIAN_TOKENS}, cut at "
            f"{settings['max_length']}; {settings['dtype']}, random weights, no dropout, mean pooling, in-batch "
            "negatives."
        ],
        headers=list(COLUMNS),
        cells=[
            fail(COLUMNS, row["shape"], row["label"], "not measured") if row["failed"] else fill(COLUMNS, row)
            for row in rows
        ],
        notes=[
            quietness(result, "*s* and *speed-up*"),
            bullets(f"Not measured: {row['shape']}, {row['label']}: {row['failed']}" for row in rows if row["failed"]),
            result["missing"],
        ],
        reading=READING,
        sections={"When not to use it": WHEN_NOT},
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.cores)
    rows = measure_all(args)
    summarize(rows, os.cpu_count())
    result = describe_run("embed_shapes", arguments, args, ("hf-longctx", "torch", "transformers"), rows)
    missing = what_is_missing(NEEDS)
    result["missing"] = (
        f"Steps of sentence-transformers' own trainer and `pack_embeddings` were not measured: {missing}."
        if missing
        else ""
    )
    finish(page_of(result), result, args.output, console)


if __name__ == "__main__":
    main()

"""A toy that shows what ALiBi is for: three tiny models learn rows of 64 bytes and read rows of 256.

    python recipes/pretrain_alibi.py --config recipes/pretrain_alibi_toy.yaml

One model has ALiBi (`hf_longctx.use_alibi` on a Llama), one rotary embeddings (the same Llama), one learned positions
(GPT-2). They read the same bytes of the Python standard library's sources. Each is then scored on the same bytes of
files that none has seen, with 64, 128 and 256 bytes up to the last of them. Writes `alibi.json` and `alibi.png`.
"""

from __future__ import annotations

import json
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..adapters.no_rotation import use_alibi
from ..config.run import LongContextConfig
from ..trainer.causal_lm import LongContextTrainer
from .recipe_file import parse_recipe, refuse_earlier_numbers


KINDS = ("alibi", "rotary", "learned")
NAMES = {"alibi": "ALiBi", "rotary": "rotary", "learned": "learned positions"}
BYTES = 256


@dataclass
class AlibiArguments:
    sources: str | None = field(default=None, metadata={"help": "Folder of `.py` files; unset: the standard library."})
    row_tokens: int = field(default=64, metadata={"help": "Bytes of a row in training."})
    score_tokens: list[int] = field(default_factory=lambda: [64, 128, 256], metadata={"help": "Lengths to score at."})
    score_rows: int = field(default=256, metadata={"help": "Rows of the longest length that are scored."})
    scored: int = field(default=63, metadata={"help": "Last bytes of each row that are the targets at every length."})
    width: int = field(default=96, metadata={"help": "Width of the models."})
    layers: int = field(default=2, metadata={"help": "Layers of the models."})
    heads: int = field(default=6, metadata={"help": "Heads of the models."})
    threads: int = field(default=1, metadata={"help": "Of torch."})


ARGUMENTS = (AlibiArguments, TrainingArguments, LongContextConfig)


def main() -> None:
    recipe, args, long_context = parse_recipe(ARGUMENTS)
    validate(recipe, args, long_context)
    refuse_earlier_numbers(Path(args.output_dir), "alibi.json")
    torch.set_num_threads(recipe.threads)
    training, held_out = read_bytes(recipe.sources)
    rows = rows_of(training, args.max_steps * args.per_device_train_batch_size, recipe.row_tokens, args.seed)
    targets = rows_of(held_out, recipe.score_rows, max(recipe.score_tokens), args.seed + 1)
    figures: dict[str, Any] = {}
    for kind in KINDS:
        trainer = LongContextTrainer(
            model=build(kind, recipe, args.seed),
            args=args,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            data_collator=default_data_collator,
            long_context=long_context,
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        scores = {
            str(length): score(trainer.model.eval(), targets[:, -length:], recipe.scored)
            for length in recipe.score_tokens
        }
        figures[kind] = {"nats_per_byte": scores, "seconds": round(seconds, 1)}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(recipe).items() if name != "sources"}
    settings |= {name: getattr(args, name) for name in ("max_steps", "per_device_train_batch_size", "learning_rate")}
    (folder / "alibi.json").write_text(json.dumps({"settings": settings, "models": figures}, indent=1) + "\n")
    show(figures, recipe)
    if draw(figures, recipe, folder / "alibi.png"):
        Console().print(f"Picture: {folder / 'alibi.png'}", soft_wrap=True)


def validate(recipe: AlibiArguments, args: TrainingArguments, long_context: LongContextConfig) -> None:
    """Raise `ValueError` for lengths at which the same bytes cannot be scored, or a run that is not one short one."""
    if long_context.sequence_parallel_size != 1 or args.max_steps < 1:
        raise ValueError(
            f"`sequence_parallel_size` ({long_context.sequence_parallel_size}) must be 1 and `max_steps` "
            f"({args.max_steps}) positive here: this toy scores whole rows on one process."
        )
    if recipe.scored >= min(recipe.score_tokens):
        raise ValueError(
            f"`scored` ({recipe.scored}) must be below the shortest of `score_tokens` ({min(recipe.score_tokens)}): "
            "the same last bytes are the targets at every length."
        )
    if recipe.width % (2 * recipe.heads):
        raise ValueError(
            f"`width` ({recipe.width}) must be a multiple of twice `heads` ({recipe.heads}): a rotation turns pairs."
        )


def read_bytes(folder: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of sources, every tenth file of them held out."""
    files = sorted(Path(folder or sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: list[list[bytes]] = [[], []]
    for number, file in enumerate(files):
        parts[number % 10 == 9].append(file.read_bytes())
    if not all(parts):
        raise ValueError(f"`sources` ({folder}) must hold ten `.py` files at least, so that one can be held out.")
    training, held_out = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return training.long(), held_out.long()


def rows_of(text: torch.Tensor, count: int, length: int, seed: int) -> torch.Tensor:
    """Rows from random places of a text, `(count, length)`."""
    if len(text) <= length:
        raise ValueError(f"the sources have {len(text):,} bytes, but a row has {length:,}: give more of them.")
    starts = torch.randint(len(text) - length, (count, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(length)]


def build(kind: str, recipe: AlibiArguments, seed: int) -> torch.nn.Module:
    """A model with random weights."""
    set_seed(seed)
    longest = max(*recipe.score_tokens, recipe.row_tokens)
    shape: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    shape |= {"vocab_size": BYTES, "use_cache": False}
    if kind == "learned":
        shape |= {"n_embd": recipe.width, "n_layer": recipe.layers, "n_head": recipe.heads, "n_positions": longest}
        shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config: PretrainedConfig = GPT2Config(**shape)
    else:
        shape |= {
            "hidden_size": recipe.width,
            "intermediate_size": 4 * recipe.width,
            "num_hidden_layers": recipe.layers,
        }
        shape |= {"num_attention_heads": recipe.heads, "max_position_embeddings": longest}
        config = LlamaConfig(**shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    if kind == "alibi":
        use_alibi(model)
    return model


@torch.no_grad()
def score(model: torch.nn.Module, rows: torch.Tensor, scored: int) -> float:
    """The mean loss of the last bytes of rows, in nats."""
    total = 0.0
    for batch in rows.split(32):
        logits = model(input_ids=batch).logits[:, -scored - 1 : -1]
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -scored:].flatten(), reduction="sum")
        )
    return total / (len(rows) * scored)


def show(figures: dict[str, Any], recipe: AlibiArguments) -> None:
    table = Table(title=f"nats a byte on the same targets; trained on rows of {recipe.row_tokens}")
    for header in ("positions", *(f"{length} bytes" for length in recipe.score_tokens), "training"):
        table.add_column(header, justify="left" if header == "positions" else "right")
    for kind, found in figures.items():
        scores = (f"{value:.3f}" for value in found["nats_per_byte"].values())
        table.add_row(NAMES[kind], *scores, f"{found['seconds']:.0f} s")
    Console().print(table)


def draw(figures: dict[str, Any], recipe: AlibiArguments, path: Path) -> bool:
    """Loss over length, one line a model; `False` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for kind, colour in zip(KINDS, ("#3b6ea5", "#2f8a5b", "#c8641b")):
        values = list(figures[kind]["nats_per_byte"].values())
        axes.plot(recipe.score_tokens, values, marker="o", color=colour, label=NAMES[kind])
    axes.axvline(recipe.row_tokens, color="#999999", lw=1, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(recipe.score_tokens, [str(length) for length in recipe.score_tokens])
    axes.minorticks_off()
    axes.set_xlabel(f"bytes read up to the same targets (dotted: the {recipe.row_tokens} of training)")
    axes.set_ylabel("nats a byte")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True

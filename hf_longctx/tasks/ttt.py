"""Train a model to learn from what it reads (TTT-E2E), on documents or on the Markov toy.

    python recipes/ttt.py --config recipes/ttt_markov_toy.yaml
    torchrun --standalone --nproc_per_node 2 recipes/ttt.py --config recipes/ttt_smollm2_stdlib.yaml

The model is one without fast weights, which gets the settings given, or one that `hf-longctx ttt convert` or an
earlier run wrote, which keeps its own. Every row is a part of one document. Arguments are those of
`TrainingArguments`, TRL's `ModelConfig` and `TTTConfig`, and the few below; the command line overrides the YAML file.
After training, held-out documents are read with inner steps and without, and the losses by chunk are printed and
written.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainingArguments, default_data_collator

from ..config.run import LongContextConfig
from ..config.test_time import TTTConfig
from ..config.values import validate_count
from ..data.files import read_text
from ..data.model_files import check_model_files
from ..trainer.causal_lm import LongContextTrainer
from ..trainer.inner_warmup import InnerLearningRateWarmup
from ..ttt.fast_config import TTTModelConfig
from ..ttt.fast_model import TTTForCausalLM
from . import ttt_toy
from .document_places import model_folder
from .named_models import find_model, load_tokenizer
from .recipe_file import check_recipe_file, given_names, parse_recipe
from .ttt_eval import TTT, WINDOW, losses_by_position, position_table


try:
    import datasets  # noqa: F401  without it, trl raises a RuntimeError
    from trl import ModelConfig, get_peft_config
except ImportError as error:
    raise ImportError("The recipe `ttt` needs trl and datasets: `pip install hf-longctx[trl]`.") from error

from ..data.documents import split_into_rows
from .inputs import RecipeArguments, check_output_dir, load_model, make_report, read_documents, train_and_save


CHUNKS_FILE = "ttt_chunks.json"
MERGED = "merged"  # the whole model next to an adapter


@dataclass
class TTTArguments(RecipeArguments):
    row_tokens: int = field(default=4096, metadata={"help": "Tokens of a row, all of one document."})
    text_field: str = field(default="text", metadata={"help": "Column that holds the text."})
    from_scratch: bool = field(default=False, metadata={"help": "Start from random weights of the model's config."})
    window_only: bool = field(default=False, metadata={"help": "The control: the same model without inner steps."})
    warmup_start: float = field(default=1.0, metadata={"help": "Inner learning rate of the first step, of the whole."})
    warmup_ratio_inner: float = field(default=0.0, metadata={"help": "Part of the steps in which it is raised."})
    num_eval_rows: int = field(default=4, metadata={"help": "Held-out rows that are read after training."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


ARGUMENTS = (TTTArguments, TrainingArguments, ModelConfig, LongContextConfig, TTTConfig)


def arguments_of(words: list[str]) -> tuple[type, ...]:
    """The dataclasses of a run on documents, or of a toy."""
    check_recipe_file(words)
    return (ttt_toy.ToyArguments,) if _is_toy(words) else ARGUMENTS


@record
def main() -> None:
    arguments = arguments_of(sys.argv[1:])
    if arguments != ARGUMENTS:
        (toy,) = parse_recipe(arguments)
        ttt_toy.main(toy)
        return
    recipe, args, model_args, long_context, settings = parse_recipe(arguments)
    check_output_dir(recipe, args)
    warmup = InnerLearningRateWarmup(recipe.warmup_start, recipe.warmup_ratio_inner)
    saved = saved_config(recipe, model_args, settings)
    rows, eval_rows = read_rows(recipe, args, model_args)
    if saved is not None:
        model, tokenizer = load_model(recipe, args, model_args, long_context, auto_class=TTTForCausalLM, config=saved)
    else:
        base, tokenizer = load_model(recipe, args, model_args, long_context, recipe.from_scratch)
        if recipe.window_only:
            settings = replace(settings, inner_learning_rate=0.0)
        model = TTTForCausalLM.from_base(base, settings)
    chunk_tokens = model.settings.chunk_tokens
    validate_row_tokens(recipe.row_tokens, chunk_tokens)
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    trainer = LongContextTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        long_context=long_context,
        callbacks=[warmup],
    )
    held_out = [] if eval_rows is None else [eval_rows[i] for i in range(min(len(eval_rows), recipe.num_eval_rows))]
    chunks = {"before": measure(trainer.model, held_out)}
    train_and_save(trainer, make_report(recipe, long_context, recipe.row_tokens), args)
    chunks["after"] = measure(trainer.model, held_out)
    if args.process_index == 0 and held_out:
        write_chunks(chunks, Path(args.output_dir), chunk_tokens, recipe.row_tokens)
    if args.process_index == 0 and peft_config is not None and not trainer.is_fsdp_enabled:
        save_merged(trainer.model, tokenizer, Path(args.output_dir) / MERGED)


def saved_config(recipe: TTTArguments, model_args: Any, settings: TTTConfig) -> TTTModelConfig | None:
    """The configuration that a saved model with fast weights is trained with, or `None` for any other model.

    Raises:
        ValueError: it has fast weights, and settings are given that are not its own.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    source = model_folder(name)
    check_model_files(source, fast_weights=True)
    try:
        found, _ = TTTModelConfig.get_config_dict(source, revision=revision)
    except OSError:  # such as a folder of a GGUF file; what is missing is reported where it is loaded
        return None
    if found.get("model_type") != TTTModelConfig.model_type:
        return None
    config = TTTModelConfig.from_pretrained(source, revision=revision)
    if recipe.from_scratch:
        raise ValueError(
            f"`from_scratch` (True) leaves out all weights of `{name}`, which has fast weights: name the base model "
            "that it was made from, with the settings of `TTTConfig`."
        )
    if recipe.gguf_file:
        raise ValueError(
            f"`gguf_file` ({recipe.gguf_file!r}) holds a base model, and `{name}` has fast weights already: leave "
            "it out, or name the folder of that file."
        )
    for key in sorted(given_names(sys.argv[1:]) & {setting.name for setting in fields(TTTConfig)}):
        own = getattr(config.settings, key)
        if getattr(settings, key) != own:
            raise ValueError(
                f"`{key}` ({getattr(settings, key)!r}) is {own!r} in `{name}`, which has fast weights already and "
                "keeps its settings: leave it out, or run `hf-longctx ttt convert` with it first."
            )
    if recipe.window_only:
        config.ttt = {**(config.ttt or {}), "inner_learning_rate": 0.0}
    return config


def _is_toy(words: list[str]) -> bool:
    if any(word.partition("=")[0] == "--toy" for word in words):
        return True
    if "--config" not in words:
        return False
    return "toy" in (yaml.safe_load(read_text(words[words.index("--config") + 1])) or {})


def read_rows(recipe: TTTArguments, args: Any, model_args: Any) -> tuple[Any, Any]:
    """Full rows to train on, and held-out ones or `None`, before the model is loaded.

    Raises:
        ValueError: no document fills a row.
    """
    validate_count("num_eval_rows", recipe.num_eval_rows, "held-out rows", least=0)
    source = find_model(model_args.model_name_or_path, "`model_name_or_path`", recipe.gguf_file)
    files = {"gguf_file": recipe.gguf_file} if recipe.gguf_file else {}
    files["revision"] = model_args.model_revision
    tokenizer = load_tokenizer(source, "`model_name_or_path`", **files)
    with args.main_process_first(desc="reading documents"):
        documents, held_out = read_documents(recipe, args, recipe.text_field, command="pretrain")
        options = {"text_field": recipe.text_field, "num_proc": recipe.dataset_num_proc}
        rows = _full_rows(documents, tokenizer, recipe.row_tokens, "to train on", options)
        if held_out is None:
            return rows, None
        return rows, _full_rows(held_out, tokenizer, recipe.row_tokens, "held out", options)


def _full_rows(documents: Any, tokenizer: Any, row_tokens: int, what: str, options: dict[str, Any]) -> Any:
    parts = split_into_rows(documents, tokenizer, row_tokens, **options)
    rows = parts.filter(lambda row: len(row["input_ids"]) == row_tokens)
    if next(iter(rows), None) is None:
        longest = max((len(part["input_ids"]) for part in parts), default=0)
        raise ValueError(
            f"`row_tokens` ({row_tokens}) is more than any document {what} has (the longest has {longest} tokens), "
            "and a row is a part of one document: lower it, or give longer documents."
        )
    return rows


def validate_row_tokens(row_tokens: int, chunk_tokens: int) -> None:
    """Raise `ValueError` for rows in which no step is ever taken."""
    if row_tokens <= chunk_tokens:
        raise ValueError(
            f"`row_tokens` ({row_tokens}) must be above `chunk_tokens` ({chunk_tokens}), after which the first inner "
            "step is taken: make rows longer, or chunks shorter."
        )


def measure(model: Any, rows: list[dict]) -> dict[str, list[float]]:
    """Loss by chunk of held-out rows, with inner steps and without; nothing without rows."""
    if not rows:
        return {}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = inner.training
    inner.eval()
    ids = [torch.tensor(row["input_ids"], device=inner.device)[None] for row in rows]
    arms = {WINDOW: lambda row: inner.read_logits(row, learn=False), TTT: lambda row: inner.read_logits(row)}
    found = losses_by_position(arms, ids, inner.settings.chunk_tokens)
    inner.train(was_training)
    return found


def save_merged(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write an adapted model in full: an adapter alone says neither window nor chunk, and `ttt eval` reads models."""
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Console().print(f"Model with its adapter merged: {folder}", soft_wrap=True)


def write_chunks(chunks: dict[str, dict[str, list[float]]], folder: Path, chunk_tokens: int, row_tokens: int) -> None:
    """Print the losses by position, and write those of every chunk next to the model."""
    console = Console()
    found = {f"{when}: {name}": losses for when, arms in chunks.items() for name, losses in arms.items()}
    console.print("\nMean loss of held-out rows before and after training, by position")
    console.print(position_table(found, chunk_tokens, row_tokens))
    (folder / CHUNKS_FILE).write_text(json.dumps(chunks, indent=1) + "\n")
    console.print(f"By chunk:   {folder / CHUNKS_FILE}", soft_wrap=True)

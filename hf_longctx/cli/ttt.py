"""`hf-longctx ttt`: add fast weights to a checkpoint, train it, and measure what learning while reading gives.

`convert` writes the checkpoint; `train` is the recipe; `eval` prints loss by position and recall of a needle in four
arms.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.test_time import META_GRADIENTS, SUFFIX_ATTENTION, TTTConfig
from .train import add_training_options, run_here_or_launch


if TYPE_CHECKING:
    from .answer import Answer

_EVAL_WIDTH = 150


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    parser = commands.add_parser("ttt", help="models that learn from what they read: convert, train, measure")
    actions = parser.add_subparsers(dest="action", required=True, title="actions", metavar="action")
    convert = actions.add_parser("convert", help="add fast weights to a checkpoint; before training it is that model")
    convert.add_argument("model", help="hub id, folder, or package:NAME")
    convert.add_argument("--output", required=True, help="folder that is written")
    convert.add_argument(
        "--window", type=int, default=None, help="tokens that attention sees; default: that of the base model"
    )
    convert.add_argument("--chunk_tokens", type=int, default=1024, help="tokens after which a step is taken")
    convert.add_argument(
        "--suffix_layers", type=int, default=None, help="last layers with fast weights; default: a quarter"
    )
    convert.add_argument(
        "--fast_intermediate_size",
        type=int,
        default=None,
        help="width of their extra MLP; default: that of the model's own",
    )
    convert.add_argument("--inner_learning_rate", type=float, default=1.0, help="of the steps while reading")
    convert.add_argument("--inner_max_grad_norm", type=float, default=1.0, help="each row's gradient is clipped to it")
    convert.add_argument("--meta_gradient", default="exact", choices=META_GRADIENTS, help="of training")
    convert.add_argument("--suffix_attention", default="eager", choices=SUFFIX_ATTENTION, help="kernel of the suffix")
    convert.add_argument("--gguf_file", default=None, help="GGUF file inside the model's folder; default: none")
    measure = actions.add_parser("eval", help="loss by position and recall of a needle, beside full attention")
    measure.add_argument("model", help="folder that `convert` or training wrote")
    measure.add_argument("--base", default=None, help="the base model; default: the one in the configuration")
    measure.add_argument("--gguf_file", default=None, help="GGUF file inside the base model's folder; default: none")
    measure.add_argument("--dataset_name", default="stdlib:", help="documents: folder, file, hub name, or stdlib:")
    measure.add_argument("--by", default="position,needle", help="position, needle or both")
    measure.add_argument("--row_tokens", type=int, default=2048, help="tokens of a row")
    measure.add_argument("--num_rows", type=int, default=4, help="rows, and needles for each distance")
    train = actions.add_parser(
        "train",
        help="train it: `hf-longctx ttt train --config run.yaml`",
        description="Train on documents, or on a toy: `hf-longctx ttt train --config run.yaml`. Arguments of the "
        "trainer, of the model and of this package may stand in the file or behind the command; --help_all "
        "lists them.",
        allow_abbrev=False,
    )
    add_training_options(train)
    train.set_defaults(takes_more=True, run=_train)
    return parser


def run(options: argparse.Namespace, answer: Answer) -> int:
    """Do what the action says and return the exit code."""
    answer.console.width = max(answer.console.width, _EVAL_WIDTH)
    return _convert(answer, options) if options.action == "convert" else _eval(answer, options)


def _train(options: argparse.Namespace) -> int:
    return run_here_or_launch("ttt", options)


def _convert(answer: Answer, options: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(TTTConfig) if hasattr(options, field.name)]
    settings = TTTConfig(**{name: getattr(options, name) for name in names})
    folder = Path(options.output)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"`--output` ({folder}) is not empty: name a new folder.")
    base, tokenizer = _load_base(options.model, options.gguf_file)
    from ..ttt.fast_model import TTTForCausalLM

    model = TTTForCausalLM.from_base(base, settings)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    fast = sum(parameter.numel() for parameter in model.primes.parameters())
    whole = model.settings
    answer.facts |= {"folder": str(folder), **dataclasses.asdict(whole), "fast_parameters": fast}
    answer.print(
        f"{folder}: window {whole.window}, chunks of {whole.chunk_tokens}, fast weights in the last "
        f"{whole.suffix_layers} of {len(model.parts.layers)} layers, {fast / 1e6:.1f} M parameters more",
    )
    return 0


def _load_base(name: str, gguf_file: str | None) -> tuple[Any, Any]:
    import transformers

    from ..data.model_files import check_model_files
    from ..tasks.document_places import model_folder

    source, options = model_folder(name), {} if gguf_file is None else {"gguf_file": gguf_file}
    check_model_files(source)
    keys: dict[str, Any] = {"attn_implementation": "packed", **options}
    if gguf_file and hasattr(transformers, "GgufConfig"):
        keys["quantization_config"] = transformers.GgufConfig(dequantize=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, **keys)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError):
        tokenizer = None
    return base, tokenizer


def _eval(answer: Answer, options: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from ..tasks.ttt_eval import MEASURES, losses_by_position, make_arms, needle_recall
    from ..ttt.fast_model import TTTForCausalLM

    wanted = [name for name in options.by.split(",") if name]
    unknown = [name for name in wanted if name not in MEASURES]
    if unknown or not wanted:
        raise ValueError(f"`--by` ({options.by}) must name {' or '.join(MEASURES)}, or both with a comma.")
    model = TTTForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    window, chunk = model.settings.window, model.settings.chunk_tokens
    if options.row_tokens <= window:
        raise ValueError(
            f"`--row_tokens` ({options.row_tokens}) must be above the window ({window}), where nothing is lost."
        )
    name = options.base or model.config.base_name
    base = None if not name else _load_base(name, options.gguf_file)[0].eval()
    if base is None:
        answer.print("No base model is known (`--base`), so full attention and the untrained arm are left out.")
    arms = make_arms(model, base)
    text = _tokens(options, tokenizer)
    numbers: dict[str, Any] = {"model": str(options.model), "row_tokens": options.row_tokens}
    if "position" in wanted:
        rows = [row[None] for row in text.split(options.row_tokens) if len(row) == options.row_tokens]
        rows = rows[: options.num_rows]
        numbers["position"] = losses_by_position(arms, rows, chunk)
        begins = range(0, options.row_tokens - 1, chunk)
        _table(answer, f"Loss of {len(rows)} rows by position", begins, numbers["position"], "{:.3f}")
    if "needle" in wanted:
        distances = [window // 2, min(2 * window, (window + options.row_tokens) // 2), options.row_tokens - chunk // 2]
        recall = needle_recall(arms, tokenizer, text, options.row_tokens, distances, options.num_rows)
        numbers["needle"] = {"distances": distances, **recall}
        title = f"Numbers repeated, asked so many tokens later (window {window})"
        _table(answer, title, distances, recall, "{:.0%}")
        answer.print("For verbatim recall beyond the window use full attention.")
    answer.facts |= numbers
    return 0


def _tokens(options: argparse.Namespace, tokenizer: Any) -> Any:
    """All tokens that are needed, of the documents one after the other."""
    import torch

    from ..tasks.document_places import open_documents

    documents = open_documents(options.dataset_name)
    found: list[int] = []
    for document in documents:
        found += tokenizer(document["text"], add_special_tokens=False)["input_ids"]
        if len(found) >= options.row_tokens * (options.num_rows + 1):
            break
    if len(found) < options.row_tokens:
        raise ValueError(
            f"`--dataset_name` ({options.dataset_name}) has {len(found)} tokens, a row has {options.row_tokens}: "
            "make rows shorter, or name more documents."
        )
    return torch.tensor(found)


def _table(answer: Answer, title: str, columns: Any, rows: dict[str, list[float]], form: str) -> None:
    from rich import box
    from rich.table import Table

    table = Table("arm", *(f"{column:,}" for column in columns), title=title, box=box.SIMPLE)
    for name, values in rows.items():
        table.add_row(name, *(form.format(value) for value in values))
    answer.console.print(table)

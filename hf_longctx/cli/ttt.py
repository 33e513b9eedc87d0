"""`hf-longctx ttt`: add fast weights to a checkpoint, train it, and measure what learning while reading gives.

`convert` writes the checkpoint; `train` is the recipe; `eval` prints loss by position and recall of a needle in four
arms (`ttt_numbers.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.test_time import META_GRADIENTS, SUFFIX_ATTENTION, TTTConfig
from .train import add_training_options, run_here_or_launch


if TYPE_CHECKING:
    from .answer import Answer


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's name, help and options."""
    parser = commands.add_parser(
        "ttt",
        help="models that learn from what they read: convert, train, measure",
        description="Models whose last layers take a gradient step after every chunk that they read (TTT-E2E). For "
        "verbatim recall beyond the window use full attention.",
    )
    actions = parser.add_subparsers(dest="action", required=True, title="actions", metavar="action")
    _add_convert(actions)
    _add_eval(actions)
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


def _add_convert(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "convert",
        help="add fast weights to a checkpoint; before training it is that model",
        description="Write a Llama-like model with fast weights in its last layers: an extra MLP that takes a "
        "gradient step after every chunk that is read. Before training it is the base model with a sliding window.",
    )
    parser.add_argument("model", help="hub id, folder, or package:NAME")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder that is written; new or empty")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens that attention sees, at least --chunk_tokens; default: the window of the base model, and needed "
        "where that attends to all tokens",
    )
    parser.add_argument(
        "--chunk_tokens", type=int, default=1024, metavar="N", help="tokens after which a step is taken"
    )
    parser.add_argument(
        "--suffix_layers", type=int, metavar="N", help="last layers with fast weights; default: a quarter"
    )
    parser.add_argument(
        "--fast_intermediate_size",
        type=int,
        metavar="N",
        help="width of their extra MLP; default: that of the model's own",
    )
    parser.add_argument(
        "--inner_learning_rate", type=float, default=1.0, metavar="X", help="learning rate of the steps while reading"
    )
    parser.add_argument(
        "--inner_max_grad_norm",
        type=float,
        default=1.0,
        metavar="X",
        help="norm to which each row's gradient of such a step is clipped",
    )
    parser.add_argument(
        "--meta_gradient",
        default="exact",
        choices=META_GRADIENTS,
        help="how training differentiates through the steps; first_order takes them as constants",
    )
    parser.add_argument(
        "--suffix_attention",
        default="eager",
        choices=SUFFIX_ATTENTION,
        help="attention kernel of the layers with fast weights",
    )
    parser.add_argument("--gguf_file", metavar="NAME", help="GGUF file inside the model's folder; default: none")


def _add_eval(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "eval",
        help="loss by position and recall of a needle, beside full attention",
        description="Read rows of documents in four arms and print the loss by position, and how many numbers are "
        "repeated when they are asked for later. The arms: full attention (the base model), window only (no steps), "
        "TTT (steps while reading), and TTT without meta-learning (steps of fast weights that were never trained).",
    )
    parser.add_argument("model", help="folder that `convert` or training wrote")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model, or none to leave its two arms out; default: the one in the configuration",
    )
    parser.add_argument("--gguf_file", metavar="NAME", help="GGUF file inside the base model's folder; default: none")
    parser.add_argument("--dataset_name", default="stdlib:", help="documents: folder, file, hub name, or stdlib:")
    parser.add_argument("--text_field", default="text", metavar="COLUMN", help="column that holds the documents")
    parser.add_argument("--by", default="position,needle", help="position, needle or both")
    parser.add_argument(
        "--row_tokens", type=int, default=2048, metavar="N", help="tokens of a row, more than the window"
    )
    parser.add_argument(
        "--num_rows", type=int, default=4, metavar="N", help="rows, and numbers asked for at each distance"
    )


def run(options: argparse.Namespace, answer: Answer) -> int:
    """Do what the action says and return the exit code."""
    if options.action == "convert":
        return _convert(answer, options)
    from .ttt_numbers import measure

    return measure(answer, options)


def _train(options: argparse.Namespace) -> int:
    return run_here_or_launch("ttt", options)


def _convert(answer: Answer, options: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(TTTConfig) if hasattr(options, field.name)]
    settings = TTTConfig(**{name: getattr(options, name) for name in names})
    folder = _new_folder(options.output)
    from ..tasks.named_models import find_model, lacks_tokenizer, load_base, load_tokenizer

    files = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    source = find_model(options.model, "`model`", options.gguf_file)
    _validate_base(source, settings, **files)
    lacks = lacks_tokenizer(source) and not files
    tokenizer = None if lacks else load_tokenizer(source, "`model`", **files)
    import torch

    from ..ttt.fast_model import TTTForCausalLM

    with answer.working(f"loading {options.model}"):
        base = load_base(source, options.gguf_file)
        torch.manual_seed(0)  # what fast weights start from is the same in every run
        model = TTTForCausalLM.from_base(base, settings)
        answer.progress(f"writing {folder}")
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
    if tokenizer is None:
        answer.print(f"`{options.model}` has no tokenizer, so none is written; `hf-longctx ttt eval` needs one there.")
    return 0


def _new_folder(name: str) -> Path:
    """A folder that nothing stands in yet, and that can be made.

    Raises:
        ValueError: it is a file, not empty, or in no folder that may be written to.
    """
    folder = Path(name).expanduser()
    if not name.strip():
        raise ValueError("`--output` is empty: name the folder that is written.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"`--output` ({folder}) is not empty: name a new folder.")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"`--output` ({folder}) is a file: name a new folder.")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"`--output` ({folder}) cannot be made in `{parent}`: name one in a folder you may write to.")
    return folder


def _validate_base(source: str, settings: TTTConfig, **files: Any) -> None:
    """Refuse by its configuration, before its weights are loaded, a base that fast weights cannot be added to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..data.model_files import check_model_files
    from ..tasks.named_models import read_model_config
    from ..ttt.base_settings import complete_settings
    from ..ttt.fast_config import TTTModelConfig

    found = read_model_config(source, "`model`") if not files else {}
    if found.get("model_type") == TTTModelConfig.model_type:
        raise ValueError(
            f"`model` ({source}) has fast weights already: measure or train it as it is, or convert the model that it "
            f"was made of (`{found.get('base_name')}`)."
        )
    check_model_files(source, weights=True)
    config = AutoConfig.from_pretrained(source, **files)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"`model` ({source}) is of type `{config.model_type}`, which is no causal language model: name a "
            "Llama-like one."
        )
    text = config.get_text_config()
    if hasattr(text, "num_hidden_layers") and hasattr(text, "intermediate_size"):
        complete_settings(settings, config)

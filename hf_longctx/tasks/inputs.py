"""What every recipe reads and writes the same way: model, documents, output folder."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback, set_seed


try:
    import datasets  # noqa: F401  without it, trl raises a RuntimeError
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError("The recipes need trl and datasets: `pip install hf-longctx[trl]`.") from error

from ..config.run import LongContextConfig
from ..config.watches import WatchConfig
from ..data.model_files import check_model_files
from ..reporting.origin import check_license
from ..reporting.report import METRICS_FILE, PICTURE_FILE, RunReport
from ..resilience.checkpoint_advisor import CheckpointAdvisor
from ..resilience.kill_switch import KillSwitch
from ..resilience.slow_rank_watch import SlowRankWatch
from ..resilience.spike_guard import LossSpikeGuard
from ..trainer.ending import end_training
from .data_kinds import other_documents, refuse_other_data
from .document_places import BUILT_IN_DATASETS, model_folder, open_documents
from .few_bit_base import prepare_few_bits, read_quantization


@dataclass
class RecipeArguments:
    """Arguments of our own, in addition to those of the trainer, the model and our configs."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Folder of documents, jsonl or parquet file, glob, data set on the Hub, `stdlib:` for the long "
            "sources of Python's standard library, `package:NAME` for the files of an installed package, or "
            "`stdlib_functions:` for its functions as prompt and completion."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read the data while training."})
    document_extensions: list[str] | None = field(
        default=None, metadata={"help": "File endings that count as documents in a folder, such as .txt .log"}
    )
    num_eval_documents: int = field(default=0, metadata={"help": "Documents held out, at random, for evaluation."})
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file inside the model's folder."})
    base_model: str | None = field(
        default=None, metadata={"help": "Name on the Hub of a model that is loaded from a folder, for the model card."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the trained model, for its card: an identifier of the Hub, such as apache-2.0."},
    )
    prepare_kbit: bool = field(
        default=False,
        metadata={
            "help": "With `load_in_4bit` or `load_in_8bit`: raise norms, embeddings and head to float32, as PEFT's "
            "`prepare_model_for_kbit_training` does. Hidden states then take twice the memory of bfloat16."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into `output_dir` though it is not empty; same names are replaced."}
    )


def check_output_dir(recipe: RecipeArguments, args) -> None:
    """Raise `ValueError` rather than write over an earlier run, and for a licence that the Hub does not know."""
    check_license(getattr(recipe, "license", None))
    folder = Path(args.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not (recipe.overwrite_output_dir or args.resume_from_checkpoint):
        raise ValueError(
            f"`output_dir` ({folder}) is not empty: choose another, continue with `--resume_from_checkpoint true`, or "
            "pass `--overwrite_output_dir` to replace files of the same names."
        )


def load_model(
    recipe: RecipeArguments,
    args,
    model_args,
    long_context: LongContextConfig,
    from_scratch: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    **changes: Any,
):
    """The model and its tokenizer; on `"ulysses"` if rows are shared, else on `"packed"`, unless told otherwise.

    `auto_class` and `changes` are for models with another head, or of a class that `AutoModel` does not know.

    The seed is set first, so that weights made after it (LoRA, from scratch) are the same for any number of processes.
    """
    set_seed(args.seed)
    quantization = read_quantization(model_args, recipe.gguf_file, from_scratch)
    if recipe.prepare_kbit and not quantization:
        raise ValueError(
            "`prepare_kbit` (True) prepares a base model of 4 or 8 bits: set `load_in_4bit: true`, or drop it."
        )
    source = model_folder(model_args.model_name_or_path)
    own_type = issubclass(auto_class, PreTrainedModel)
    check_model_files(source, weights=not from_scratch, fast_weights=own_type)
    options = {"revision": model_args.model_revision}
    if recipe.gguf_file:
        options["gguf_file"] = recipe.gguf_file
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    attention = "ulysses" if long_context.sequence_parallel_size > 1 else "packed"
    options |= {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation or attention}
    if from_scratch:
        kept = {key: value for key, value in options.items() if key in ("revision", "gguf_file")}
        config = AutoConfig.from_pretrained(source, **kept)
        model = AutoModelForCausalLM.from_config(
            config, **{key: options[key] for key in ("dtype", "attn_implementation")}
        )
        model.config._name_or_path = model.name_or_path = ""  # its weights are not those of the name
    else:
        if recipe.gguf_file and hasattr(transformers, "GgufConfig"):  # without it, weights may stay packed and frozen
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = auto_class.from_pretrained(source, **options, **quantization, **changes)
        if quantization:
            checkpointing = args.gradient_checkpointing
            prepare_few_bits(model, raise_to_float32=recipe.prepare_kbit, checkpointing=checkpointing)
    if recipe.base_model:  # an adapter should point to the Hub, not to a folder of this machine
        model.config._name_or_path = model.name_or_path = recipe.base_model
    return model, tokenizer


def read_documents(
    recipe: RecipeArguments,
    args,
    text_field: str | None = "text",
    or_columns: Collection[str] = (),
    command: str | None = None,
) -> tuple[Any, Any]:
    """Training and evaluation documents; the latter may be `None`. `command` is the one that wants them, for messages
    about data of another."""
    if not recipe.dataset_name:
        raise ValueError(
            "`dataset_name` is missing: give a folder of documents, a jsonl or parquet file, or a hub name."
        )
    if recipe.num_eval_documents and recipe.dataset_streaming:
        raise ValueError(
            "`num_eval_documents` needs a data set that is read at once: set `dataset_streaming` to false."
        )
    place = recipe.dataset_name
    where: dict[str, Any] = {"split": recipe.dataset_split, "config_name": recipe.dataset_config}
    where |= {"extensions": recipe.document_extensions, "streaming": recipe.dataset_streaming}
    try:
        documents = open_documents(place, text_field=text_field, or_columns=or_columns, **where)
    except ValueError as error:
        found = None if command is None else other_documents(place, command, **where)
        if found is None:
            raise
        raise ValueError(f"`dataset_name` ({place}) holds {found}: run that command, or give documents.") from error
    if command is not None:
        refuse_other_data(place, documents, command, text_field, or_columns)
    if not recipe.num_eval_documents:
        return documents, None
    parts = documents.train_test_split(test_size=recipe.num_eval_documents, seed=args.seed)
    return parts["train"], parts["test"]


def make_watches(config: WatchConfig) -> list[TrainerCallback]:
    """The callbacks that a recipe's file asks for."""
    watches: list[TrainerCallback] = []
    if config.kill_switch is not None:
        watches.append(KillSwitch(config.kill_switch))
    if config.spike_action is not None:
        numbers = {"window": config.spike_window, "limit": config.spike_limit}
        watches.append(LossSpikeGuard(config.spike_action, deviations=config.spike_deviations, **numbers))
    if config.slow_rank_every is not None:
        watches.append(SlowRankWatch(every=config.slow_rank_every))
    if config.advise_checkpoints:
        watches.append(CheckpointAdvisor(hours_between_failures=config.hours_between_failures))
    return watches


def make_report(recipe: RecipeArguments, long_context, row_tokens: int | None) -> RunReport:
    """The report of a run, with names a reader elsewhere understands."""
    dataset = recipe.dataset_name
    if dataset in BUILT_IN_DATASETS:
        dataset = BUILT_IN_DATASETS[dataset]
    elif dataset is not None and os.path.exists(dataset):  # a card is public, and where a folder lies is not
        dataset = Path(dataset).resolve().name
    return RunReport(
        sequence_parallel_size=long_context.sequence_parallel_size,
        row_tokens=row_tokens,
        base_model=recipe.base_model,
        dataset=dataset,
        datasets=[] if recipe.dataset_name in BUILT_IN_DATASETS else [recipe.dataset_name or ""],
        license=recipe.license,
    )


def train_and_save(trainer, report: RunReport, args) -> None:
    """Train, save the model with its report, and say where everything is."""
    report.attach(trainer)
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    report.write(args.output_dir)
    if trainer.is_world_process_zero():
        if args.push_to_hub:  # transformers uploaded the folder with its own card
            card = Path(args.output_dir, "README.md")
            HfApi(token=args.hub_token).upload_file(
                path_or_fileobj=card, path_in_repo=card.name, repo_id=trainer.hub_model_id
            )
        _show(Path(args.output_dir))
    end_training(trainer)


def _show(folder: Path) -> None:
    console = Console()
    console.print(f"Model:      {folder}", soft_wrap=True)
    for what, name in (("Numbers:", METRICS_FILE), ("Picture:", PICTURE_FILE), ("Model card:", "README.md")):
        if (folder / name).is_file():
            console.print(f"{what:<11} {folder / name}", soft_wrap=True)

"""Fine-tune a language model on long documents, or on conversations, with sequences shared by several processes.

    torchrun --standalone --nproc_per_node 8 recipes/sft.py --config recipes/sft_folder_of_documents.yaml

Arguments are those of TRL's `SFTConfig` and `ModelConfig`, of `LongContextConfig`, `MemoryConfig`, `IndexerConfig`,
`RampConfig` and `WatchConfig`, and the few of `inputs.RecipeArguments`; the command line overrides the YAML file. A
document longer than `max_length` becomes several consecutive rows; nothing is truncated away. Conversations
(`messages`, or `prompt` and `completion`) are prepared and, beyond `max_length`, truncated by TRL, as always;
`packing: true` puts several of them in a row, kept apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.distributed.elastic.multiprocessing.errors import record


try:
    import datasets  # noqa: F401  without it, trl raises a RuntimeError
    from trl import ModelConfig, SFTConfig, get_peft_config
except ImportError as error:
    raise ImportError("The recipe `sft` needs trl and datasets: `pip install hf-longctx[trl]`.") from error

from ..config.indexer import IndexerConfig
from ..config.memory import MemoryConfig
from ..config.ramp import RampConfig
from ..config.run import LongContextConfig
from ..config.watches import WatchConfig
from ..data.documents import column_names, split_into_rows
from ..trainer.sft import LongContextSFTTrainer
from .inputs import (
    RecipeArguments,
    check_output_dir,
    load_model,
    make_report,
    make_watches,
    read_documents,
    train_and_save,
)
from .recipe_file import parse_recipe


CONVERSATIONS = ("messages", "prompt", "conversations")


@dataclass
class SFTArguments(RecipeArguments):
    join_documents: bool = field(
        default=False,
        metadata={"help": "Let documents follow one another, so that every row has exactly `max_length` tokens."},
    )


def make_rows(documents, tokenizer, args, join_documents: bool):
    """Rows of tokens from documents; conversations as they are."""
    if documents is None or args.max_length is None or set(CONVERSATIONS) & set(column_names(documents)):
        return documents
    options = {"text_field": args.dataset_text_field, "num_proc": args.dataset_num_proc}
    options["join_documents"] = join_documents
    return split_into_rows(documents, tokenizer, args.max_length, **options)


CONFIGS = (LongContextConfig, MemoryConfig, IndexerConfig, RampConfig, WatchConfig)
ARGUMENTS = (SFTArguments, SFTConfig, ModelConfig, *CONFIGS)


@record
def main() -> None:
    recipe, args, model_args, long_context, memory, indexer, ramp, watch = parse_recipe(ARGUMENTS)
    check_output_dir(recipe, args)
    if args.include_num_input_tokens_seen == "no":  # the report's throughput counts real tokens
        is_flat = args.padding_free or (args.packing and args.packing_strategy != "wrapped")
        args.include_num_input_tokens_seen = "all" if is_flat else "non_padding"
    model, tokenizer = load_model(recipe, args, model_args, long_context)
    with args.main_process_first(desc="reading documents"):
        documents, eval_documents = read_documents(recipe, args, args.dataset_text_field, CONVERSATIONS, "sft")
        rows, eval_rows = (
            make_rows(part, tokenizer, args, recipe.join_documents) for part in (documents, eval_documents)
        )
    trainer = LongContextSFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        long_context=long_context,
        memory=memory,
        indexer=indexer,
        ramp=ramp,
        callbacks=make_watches(watch),
    )
    train_and_save(trainer, make_report(recipe, long_context, args.max_length), args)

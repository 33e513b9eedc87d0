"""Train a language model further, or from scratch, on rows of exactly `row_tokens` tokens made of whole documents.

    torchrun --standalone --nproc_per_node 2 recipes/pretrain.py --config recipes/pretrain_smollm2_stdlib.yaml

Documents follow one another, each closed by the end-of-sequence token, and are cut every `row_tokens` tokens, as in
ordinary pretraining; a token sees what precedes it in its row, whichever document that came from. Arguments are those
of `TrainingArguments`, of TRL's `ModelConfig`, of `LongContextConfig`, `MemoryConfig`, `IndexerConfig`, `RampConfig`
and `WatchConfig`, and the few below; the command line overrides the YAML file. With `blend_sources` rows come from
several sources, in exact proportions; `recipes/pretrain_blend.yaml` is an example.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainingArguments, default_data_collator


try:
    import datasets  # noqa: F401  without it, trl raises a RuntimeError
    from trl import ModelConfig, get_peft_config
except ImportError as error:
    raise ImportError("The recipe `pretrain` needs trl and datasets: `pip install hf-longctx[trl]`.") from error

from ..adapters.embedding_norm import add_embedding_norm
from ..config.indexer import IndexerConfig
from ..config.memory import MemoryConfig
from ..config.ramp import RampConfig
from ..config.run import LongContextConfig
from ..config.watches import WatchConfig
from ..data.documents import split_into_rows
from ..reporting.blend_report import BlendReport
from ..trainer.causal_lm import LongContextTrainer
from .blend_inputs import BlendArguments, read_blend
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


@dataclass
class PretrainArguments(RecipeArguments):
    row_tokens: int = field(default=4096, metadata={"help": "Tokens of every row, all of them real."})
    text_field: str = field(default="text", metadata={"help": "Column that holds the text."})
    from_scratch: bool = field(default=False, metadata={"help": "Start from random weights of the model's config."})
    embedding_norm: bool = field(
        default=False, metadata={"help": "With `from_scratch`: a LayerNorm behind the word embedding, as BLOOM has."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


CONFIGS = (LongContextConfig, MemoryConfig, IndexerConfig, RampConfig, WatchConfig)
ARGUMENTS = (PretrainArguments, TrainingArguments, ModelConfig, *CONFIGS, BlendArguments)


@record
def main() -> None:
    recipe, args, model_args, long_context, memory, indexer, ramp, watch, blend = parse_recipe(ARGUMENTS)
    check_output_dir(recipe, args)
    if args.include_num_input_tokens_seen == "no":
        args.include_num_input_tokens_seen = "all"  # rows have no padding
    model, tokenizer = load_model(recipe, args, model_args, long_context, recipe.from_scratch)
    if recipe.embedding_norm:
        add_embedding_norm(model)
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    with args.main_process_first(desc="reading documents"):
        options = {"text_field": recipe.text_field, "num_proc": recipe.dataset_num_proc, "join_documents": True}
        if blend.blend_sources:
            rows, eval_rows = read_blend(blend, recipe, args, tokenizer, row_tokens=recipe.row_tokens, **options)
        else:
            rows, eval_rows = (
                part and split_into_rows(part, tokenizer, recipe.row_tokens, **options)
                for part in read_documents(recipe, args, recipe.text_field, command="pretrain")
            )
    trainer = LongContextTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        long_context=long_context,
        memory=memory,
        indexer=indexer,
        ramp=ramp,
        callbacks=make_watches(watch),
    )
    report = make_report(recipe, long_context, recipe.row_tokens)
    if blend.blend_sources:
        report.dataset = "a blend of " + ", ".join(rows.names)
        report.datasets = [source.partition("=")[2] for source in blend.blend_sources]
        BlendReport().attach(trainer)
    train_and_save(trainer, report, args)

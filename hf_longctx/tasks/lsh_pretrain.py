"""A language model of bytes from scratch, on LSH attention: shared queries and keys, long rows.

    python recipes/lsh_pretrain.py --config recipes/lsh_pretrain_stdlib.yaml
    torchrun --standalone --nproc_per_node 2 recipes/lsh_pretrain.py --config ... --sequence_parallel_size 2

It reads the sources of Python's standard library; every tenth file is held out. The saved model is a plain Llama whose
`config.json` has the settings of its attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments, default_data_collator, set_seed

from ..adapters.hashed import use_lsh
from ..adapters.tied_query_key import tie_query_key
from ..config.lsh_settings import LSH, LSHConfig
from ..config.memory import MemoryConfig
from ..config.run import LongContextConfig
from ..trainer.causal_lm import LongContextTrainer
from ..trainer.ending import end_training
from .pretrain_alibi import BYTES, read_bytes, rows_of
from .recipe_file import parse_recipe, refuse_earlier_numbers


@dataclass
class LSHPretrainArguments:
    sources: str | None = field(default=None, metadata={"help": "Folder of `.py` files; unset: the standard library."})
    row_tokens: int = field(default=4096, metadata={"help": "Bytes of a row."})
    eval_rows: int = field(default=4, metadata={"help": "Rows of held-out files for `eval_loss`."})
    width: int = field(default=128, metadata={"help": "Width of the model."})
    layers: int = field(default=2, metadata={"help": "Layers of the model."})
    heads: int = field(default=4, metadata={"help": "Heads of the model, of keys as of queries."})
    threads: int | None = field(default=None, metadata={"help": "Of torch; unset: its own choice."})


ARGUMENTS = (LSHPretrainArguments, TrainingArguments, LongContextConfig, MemoryConfig, LSHConfig)


@record
def main() -> None:
    recipe, args, long_context, memory, lsh = parse_recipe(ARGUMENTS)
    if args.max_steps < 1 or recipe.width % (2 * recipe.heads):
        raise ValueError(
            f"`max_steps` ({args.max_steps}) must be positive, and `width` ({recipe.width}) a multiple of twice "
            f"`heads` ({recipe.heads}): a rotation turns pairs."
        )
    refuse_earlier_numbers(Path(args.output_dir), "config.json")
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    training, held_out = read_bytes(recipe.sources)
    groups = max(args.world_size // long_context.sequence_parallel_size, 1)
    count = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * groups
    rows, eval_rows = (
        [{"input_ids": row, "labels": row} for row in rows_of(text, number, recipe.row_tokens, args.seed)]
        for text, number in ((training, count), (held_out, recipe.eval_rows))
    )
    trainer = LongContextTrainer(
        model=build(recipe, lsh, LSH if long_context.sequence_parallel_size == 1 else "ulysses", args.seed),
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=default_data_collator,
        long_context=long_context,
        memory=memory,
    )
    trainer.train()
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    end_training(trainer)


def build(recipe: LSHPretrainArguments, lsh: LSHConfig, attention: str, seed: int) -> torch.nn.Module:
    """A Llama with random weights that makes its keys as it makes its queries."""
    set_seed(seed)
    no_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.row_tokens,
        **no_tokens,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    tie_query_key(model)
    use_lsh(model, lsh)
    return model

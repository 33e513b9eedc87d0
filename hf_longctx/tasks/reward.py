"""Train a model that scores answers on pairs of a better and a worse one, with sequences shared by several processes.

    torchrun --standalone --nproc_per_node 8 recipes/reward.py --config recipes/reward_long_pairs.yaml

Arguments are those of TRL's `RewardConfig` and `ModelConfig`, of `LongContextConfig` and `MemoryConfig`, and the few
of `inputs.RecipeArguments`; the command line overrides the YAML file. Rows have `chosen` and `rejected`, with or
without a `prompt` before them, and may have a `margin`.
"""

from __future__ import annotations

import torch
from torch.distributed.elastic.multiprocessing.errors import record


try:
    import datasets  # noqa: F401  without it, trl raises a RuntimeError
    from trl import ModelConfig, RewardConfig, get_peft_config
except ImportError as error:
    raise ImportError("The recipe `reward` needs trl and datasets: `pip install hf-longctx[trl]`.") from error

from transformers import AutoModelForSequenceClassification

from ..config.memory import MemoryConfig
from ..config.run import LongContextConfig
from ..trainer.reward import LongContextRewardTrainer
from .dpo import read_pairs
from .inputs import RecipeArguments, check_output_dir, load_model, make_report, train_and_save
from .recipe_file import parse_recipe


ARGUMENTS = (RecipeArguments, RewardConfig, ModelConfig, LongContextConfig, MemoryConfig)


@record
def main() -> None:
    recipe, args, model_args, long_context, memory = parse_recipe(ARGUMENTS)
    check_output_dir(recipe, args)
    if args.include_num_input_tokens_seen == "no":  # the report's throughput counts real tokens
        args.include_num_input_tokens_seen = "non_padding"
    model_args.lora_task_type = "SEQ_CLS"  # PEFT then trains the new head too; TRL's default is a language model's
    model, tokenizer = load_model(
        recipe, args, model_args, long_context, auto_class=AutoModelForSequenceClassification, num_labels=1
    )
    if getattr(model, "is_quantized", False) and model.score.weight.dtype != torch.bfloat16 and not args.bf16:
        raise NotImplementedError(
            f"`dtype` ({model_args.dtype}) of a reward model with weights of 4 or 8 bits: TRL casts the new head to "
            "bfloat16, which then meets other hidden states; set `dtype: bfloat16`, or `bf16: true`."
        )
    pairs, eval_pairs = read_pairs(recipe, args, "reward")
    trainer = LongContextRewardTrainer(
        model=model,
        args=args,
        train_dataset=pairs,
        eval_dataset=eval_pairs,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        long_context=long_context,
        memory=memory,
    )
    train_and_save(trainer, make_report(recipe, long_context, args.max_length), args)

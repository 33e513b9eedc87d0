"""Train on pairs of a preferred and a rejected answer (DPO), with sequences shared by several processes.

    torchrun --standalone --nproc_per_node 8 recipes/dpo.py --config recipes/dpo_long_pairs.yaml

Arguments are those of TRL's `DPOConfig` and `ModelConfig`, of `LongContextConfig`, `MemoryConfig` and
`PreferenceConfig`, and the few of `inputs.RecipeArguments`; the command line overrides the YAML file. Rows have
`prompt`, `chosen` and `rejected`. The reference is the model as it was loaded; with `use_peft` it is the model without
its adapter, and takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record


try:
    import datasets  # noqa: F401  without it, trl raises a RuntimeError
    from trl import DPOConfig, ModelConfig, get_peft_config
except ImportError as error:
    raise ImportError("The recipe `dpo` needs trl and datasets: `pip install hf-longctx[trl]`.") from error

from ..config.memory import MemoryConfig
from ..config.pair_rows import PreferenceConfig
from ..config.run import LongContextConfig
from ..data.documents import column_names
from ..trainer.preference import LongContextDPOTrainer
from .data_kinds import other_data
from .inputs import RecipeArguments, check_output_dir, load_model, make_report, read_documents, train_and_save
from .recipe_file import parse_recipe


PAIRS = ("chosen", "rejected")
ARGUMENTS = (RecipeArguments, DPOConfig, ModelConfig, LongContextConfig, MemoryConfig, PreferenceConfig)


def read_pairs(recipe: RecipeArguments, args, command: str = "dpo") -> tuple:
    """Pairs to train on, and to evaluate or `None`; `ValueError` where they have no `chosen` or `rejected`."""
    with args.main_process_first(desc="reading pairs"):
        pairs, eval_pairs = read_documents(recipe, args, None, PAIRS)
    missing = [name for name in PAIRS if name not in column_names(pairs)]
    if missing:
        found = other_data(column_names(pairs), command)
        raise ValueError(
            f"`dataset_name` ({recipe.dataset_name}) has the columns {', '.join(sorted(column_names(pairs)))} and no "
            f"`{missing[0]}`: pairs need `chosen` and `rejected`{f'; these are {found}' if found else ''}."
        )
    return pairs, eval_pairs


def train_beside_reference(
    trainer_class: type, arguments: Sequence[type], read: Callable[[RecipeArguments, Any], tuple[Any, Any]]
) -> None:
    """The body of a recipe whose policy is compared with a reference.

    Args:
        trainer_class (`type`): of TRL's preference trainers.
        arguments (`Sequence[type]`): [`ARGUMENTS`], with the trainer's own configuration.
        read (`Callable`): `(recipe, args) -> (rows, rows to evaluate or None)`.
    """
    recipe, args, model_args, long_context, memory, preference = parse_recipe(arguments)
    check_output_dir(recipe, args)
    if args.include_num_input_tokens_seen == "no":  # the report's throughput counts real tokens
        args.include_num_input_tokens_seen = "non_padding"
    model, tokenizer = load_model(recipe, args, model_args, long_context)
    reference = None
    if not model_args.use_peft and not args.precompute_ref_log_probs:
        reference, _ = load_model(recipe, args, model_args, long_context)
    rows, eval_rows = read(recipe, args)
    trainer = trainer_class(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        long_context=long_context,
        memory=memory,
        preference=preference,
    )
    train_and_save(trainer, make_report(recipe, long_context, args.max_length), args)


@record
def main() -> None:
    train_beside_reference(LongContextDPOTrainer, ARGUMENTS, read_pairs)

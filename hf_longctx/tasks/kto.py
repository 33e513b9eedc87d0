"""Train on answers that are marked as good or bad (KTO), with sequences shared by several processes.

    torchrun --standalone --nproc_per_node 8 recipes/kto.py --config run.yaml

Arguments are those of TRL's `KTOConfig` and `ModelConfig`, of `LongContextConfig`, `MemoryConfig` and
`PreferenceConfig`, and the few of `inputs.RecipeArguments`; the command line overrides the YAML file. Rows have
`prompt`, `completion` and `label`, or are pairs (`chosen`, `rejected`), of which each becomes two rows. The reference
is the model as it was loaded; with `use_peft` it is the model without its adapter, and takes no memory.
"""

from __future__ import annotations

from torch.distributed.elastic.multiprocessing.errors import record


try:
    import datasets  # noqa: F401  without it, trl raises a RuntimeError
    from trl import KTOConfig, ModelConfig
except ImportError as error:
    raise ImportError("The recipe `kto` needs trl and datasets: `pip install hf-longctx[trl]`.") from error

from ..config.memory import MemoryConfig
from ..config.pair_rows import PreferenceConfig
from ..config.run import LongContextConfig
from ..data.documents import column_names
from ..trainer.preference import LongContextKTOTrainer
from .data_kinds import other_data
from .dpo import PAIRS, train_beside_reference
from .inputs import RecipeArguments, read_documents


MARKED = ("completion", "label")
ARGUMENTS = (RecipeArguments, KTOConfig, ModelConfig, LongContextConfig, MemoryConfig, PreferenceConfig)


def read_marked(recipe: RecipeArguments, args) -> tuple:
    """Answers to train on, and to evaluate or `None`; `ValueError` where they are neither marked nor pairs."""
    with args.main_process_first(desc="reading answers"):
        answers, eval_answers = read_documents(recipe, args, None, (*MARKED, *PAIRS))
    names = column_names(answers)
    if not set(MARKED) <= set(names) and not set(PAIRS) <= set(names):
        found = other_data(names, "kto")
        raise ValueError(
            f"`dataset_name` ({recipe.dataset_name}) has the columns {', '.join(sorted(names))}: KTO needs `prompt`, "
            "`completion` and `label`, or pairs of `chosen` and `rejected`"
            f"{f'; these are {found}' if found else ''}."
        )
    return answers, eval_answers


@record
def main() -> None:
    train_beside_reference(LongContextKTOTrainer, ARGUMENTS, read_marked)

"""Fine-tune a language model on long documents, or on conversations, with sequences shared by several processes.

    torchrun --standalone --nproc_per_node 8 recipes/sft.py --config recipes/sft_folder_of_documents.yaml

Arguments are those of TRL's `SFTConfig` and `ModelConfig`, of `LongContextConfig` and `MemoryConfig`, and the few of
`inputs.RecipeArguments`; the command line overrides the YAML file. A document longer than `max_length` becomes several
consecutive rows; nothing is truncated away. Conversations (`messages`, or `prompt` and `completion`) are prepared and,
beyond `max_length`, truncated by TRL, as always; `packing: true` puts several of them in a row, kept apart.
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("sft"))

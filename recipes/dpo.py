"""Train on pairs of a preferred and a rejected answer (DPO), with sequences shared by several processes.

    torchrun --standalone --nproc_per_node 8 recipes/dpo.py --config recipes/dpo_long_pairs.yaml

Arguments are those of TRL's `DPOConfig` and `ModelConfig`, of `LongContextConfig`, `MemoryConfig` and
`PreferenceConfig`, and the few of `inputs.RecipeArguments`; the command line overrides the YAML file. Rows have
`prompt`, `chosen` and `rejected`. The reference is the model as it was loaded; with `use_peft` it is the model without
its adapter, and takes no memory.
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("dpo"))

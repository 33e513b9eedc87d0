"""Train on answers that are marked as good or bad (KTO), with sequences shared by several processes.

    torchrun --standalone --nproc_per_node 8 recipes/kto.py --config run.yaml

Arguments are those of TRL's `KTOConfig` and `ModelConfig`, of `LongContextConfig`, `MemoryConfig` and
`PreferenceConfig`, and the few of `inputs.RecipeArguments`; the command line overrides the YAML file. Rows have
`prompt`, `completion` and `label`, or are pairs of `chosen` and `rejected`.
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("kto"))

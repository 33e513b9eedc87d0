"""Train a model that scores answers on pairs of a better and a worse one, with sequences shared by several processes.

    torchrun --standalone --nproc_per_node 8 recipes/reward.py --config recipes/reward_long_pairs.yaml

Arguments are those of TRL's `RewardConfig` and `ModelConfig`, of `LongContextConfig` and `MemoryConfig`, and the few
of `inputs.RecipeArguments`; the command line overrides the YAML file. Rows have `chosen` and `rejected`, with or
without a `prompt` before them, and may have a `margin`.
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("reward"))

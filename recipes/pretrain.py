"""Train a language model further, or from scratch, on rows of exactly `row_tokens` tokens made of whole documents.

    torchrun --standalone --nproc_per_node 2 recipes/pretrain.py --config recipes/pretrain_smollm2_stdlib.yaml

Documents follow one another, each closed by the end-of-sequence token, and are cut every `row_tokens` tokens, as in
ordinary pretraining; a token sees what precedes it in its row, whichever document that came from. Arguments are those
of `TrainingArguments`, of TRL's `ModelConfig`, of `LongContextConfig` and `MemoryConfig`, and the few below; the
command line overrides the YAML file.
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("pretrain"))

"""The stages in which a dense model becomes a sparse one, on a toy that recalls: dense, warm-up, sparse.

    python recipes/indexer_warmup.py --config recipes/indexer_warmup_tiny.yaml

Arguments are those of `TrainingArguments`, of `LongContextConfig`, `MemoryConfig` and `IndexerConfig`, and the few of
the toy; the command line overrides the YAML file.
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("indexer_warmup"))

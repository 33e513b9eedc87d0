"""Train an embedder on pairs or triplets from many sources, on documents that several processes share if need be.

    torchrun --standalone --nproc_per_node 8 recipes/embed.py --config recipes/embed_allnli.yaml

Arguments are those of `SentenceTransformerTrainingArguments`, of `LongContextConfig`, `SourcesConfig` and
`TextsConfig`, and the few of `embed_model.EmbeddingModelArguments`, `embed_sources.SourceArguments` and
`EmbedArguments`; the command line overrides the YAML file. Nothing is padded. Unavailable sources are logged,
with their rows and weight, and left out. What is saved is an ordinary sentence-transformer.
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("embed"))

"""Train a model that learns from what it reads, on documents or on the Markov toy.

python recipes/ttt.py --config recipes/ttt_markov_toy.yaml
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("ttt"))

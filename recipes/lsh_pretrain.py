"""Train a small language model of bytes from scratch on LSH attention; on one process or several a row.

python recipes/lsh_pretrain.py --config recipes/lsh_pretrain_stdlib.yaml
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("lsh_pretrain"))

"""Which kinds of sparse layers can recall: four DeepSeek-V4 of two layers learn the same rows, some minutes on a core.

python recipes/recall_sparse.py --output_dir runs/recall_sparse
"""

import sys

from hf_longctx.cli.train import run_task


if __name__ == "__main__":
    sys.exit(run_task("recall_sparse"))
